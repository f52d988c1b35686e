"""grouped_matmul and grouped_swiglu against the float64 oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import (
    BlockScaledWeights,
    block_scaled,
    dequantise,
    grouped_matmul,
    grouped_swiglu,
)
from tests import oracle_experts as oracle
from tests.pallas_kernels.grouped_matmul_cases import CASES, ODD_CASES, Case, make_inputs

PORTABLE = ("reference", "xla")
# float32 sums of up to 900 products of order one, in any order.
TOLERANCE = {jnp.float32: 2e-5, jnp.bfloat16: 2e-2}


def close(got, want, dtype=jnp.float32):
    """Largest error relative to the largest value."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    assert np.isfinite(got).all()
    assert np.abs(got - want).max() <= TOLERANCE[dtype] * max(1.0, np.abs(want).max())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("implementation", PORTABLE)
@pytest.mark.parametrize("case", CASES + ODD_CASES, ids=str)
def test_matmul_and_gradients(case: Case, implementation, dtype):
    inputs = make_inputs(case)
    lhs, rhs, d_out = (jnp.asarray(x, dtype) for x in (inputs.lhs, inputs.rhs, inputs.d_out))
    offset = case.offset or 0

    @jax.jit
    def run(lhs, rhs, sizes, d_out):
        def call(lhs, rhs):
            return grouped_matmul(
                lhs, rhs, sizes, group_offset=case.offset, implementation=implementation
            )

        out, pull = jax.vjp(call, lhs, rhs)
        return out, *pull(d_out)

    out, d_lhs, d_rhs = run(lhs, rhs, inputs.group_sizes, d_out)
    assert (out.dtype, d_lhs.dtype, d_rhs.dtype) == (dtype, dtype, dtype)
    lhs, rhs, d_out = (np.asarray(x, np.float64) for x in (lhs, rhs, d_out))
    close(out, oracle.grouped_matmul(lhs, rhs, inputs.group_sizes, offset=offset), dtype)
    want = oracle.grouped_matmul_gradients(lhs, rhs, inputs.group_sizes, d_out, offset=offset)
    close(d_lhs, want[0], dtype)
    close(d_rhs, want[1], dtype)
    empty = inputs.group_sizes[offset : offset + case.held] == 0
    assert not np.asarray(d_rhs)[empty].any()


@pytest.mark.parametrize("implementation", PORTABLE)
@pytest.mark.parametrize("case", CASES + ODD_CASES, ids=str)
def test_swiglu_and_gradients(case: Case, implementation):
    inputs = make_inputs(case, seed=1)
    offset = case.offset or 0
    arrays = (inputs.lhs, inputs.rhs, inputs.second_rhs)

    @jax.jit
    def run(lhs, gate, up, sizes, d_hidden):
        def call(lhs, gate, up):
            return grouped_swiglu(
                lhs, gate, up, sizes, group_offset=case.offset, implementation=implementation
            )

        hidden, pull = jax.vjp(call, lhs, gate, up)
        return call(lhs, gate, up), hidden, *pull(d_hidden)

    primal, hidden, *gradients = run(*arrays, inputs.group_sizes, inputs.d_out)
    want = oracle.grouped_swiglu(*arrays, inputs.group_sizes, offset=offset)
    close(primal, want)
    close(hidden, want)
    wants = oracle.grouped_swiglu_gradients(
        *arrays, inputs.group_sizes, inputs.d_out, offset=offset
    )
    for got, want in zip(gradients, wants, strict=True):
        close(got, want)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn])
@pytest.mark.parametrize("implementation", PORTABLE)
def test_quantised_weights(implementation, dtype):
    case = Case("quantised", 96, 200, 136, (40, 0, 56))
    inputs = make_inputs(case)
    gate, up = (block_scaled(jnp.asarray(x), dtype) for x in (inputs.rhs, inputs.second_rhs))
    assert gate.scales.shape == (3, 2, 2)
    gate_f32, up_f32 = (dequantise(x.values, x.scales, jnp.float32) for x in (gate, up))
    # Half a step of int8's 127, or of float8_e4m3fn's 3 mantissa bits, of the largest weight.
    step = {jnp.int8: 1 / 254, jnp.float8_e4m3fn: 1 / 16}[dtype]
    assert np.abs(gate_f32 - inputs.rhs).max() <= 1.001 * step * np.abs(inputs.rhs).max()

    sizes = inputs.group_sizes
    out = grouped_matmul(inputs.lhs, gate, sizes, implementation=implementation)
    close(out, oracle.grouped_matmul(inputs.lhs, gate_f32, sizes))
    hidden = grouped_swiglu(inputs.lhs, gate, up, sizes, implementation=implementation)
    close(hidden, oracle.grouped_swiglu(inputs.lhs, gate_f32, up_f32, sizes))
    turned = BlockScaledWeights(up.values.mT, up.scales.mT)
    out = grouped_matmul(
        inputs.lhs, turned, sizes, transpose_rhs=True, implementation=implementation
    )
    close(out, oracle.grouped_matmul(inputs.lhs, up_f32, sizes))
    with pytest.raises(ValueError, match="rhs_GKN: BlockScaledWeights"):
        jax.grad(lambda lhs: grouped_matmul(lhs, gate, sizes, implementation=implementation).sum())(
            inputs.lhs
        )
