"""grouped_matmul and grouped_swiglu against the float64 oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import (
    BlockScaledWeights,
    LayerOfStack,
    block_scaled,
    dequantise,
    grouped_matmul,
    grouped_swiglu,
)
from pallas_kernels.grouped_matmul.cases import CASES, ODD_CASES, Case, make_inputs
from tests import oracle_experts as oracle

PORTABLE = ("reference", "xla")
# float32 sums of up to 900 products of order one, in any order.
TOLERANCE = {jnp.float32: 2e-5, jnp.bfloat16: 2e-2}


def close(got, want, dtype=jnp.float32):
    """Largest error relative to the largest value."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    assert np.isfinite(got).all()
    assert np.abs(got - want).max() <= TOLERANCE[dtype] * max(1.0, np.abs(want).max())


@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [("reference", jnp.float32), ("xla", jnp.float32), ("xla", jnp.bfloat16)],
)
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
    lhs64, rhs64, d_out64 = (np.asarray(x, np.float64) for x in (lhs, rhs, d_out))
    sizes = inputs.group_sizes
    close(out, oracle.grouped_matmul(lhs64, rhs64, sizes, offset=offset), dtype)
    want = oracle.grouped_matmul_gradients(lhs64, rhs64, sizes, d_out64, offset=offset)
    close(d_lhs, want[0], dtype)
    close(d_rhs, want[1], dtype)
    empty = np.asarray(inputs.group_sizes)[offset : offset + case.held] == 0
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

    sizes, lhs = inputs.group_sizes, inputs.lhs
    out = grouped_matmul(lhs, gate, sizes, implementation=implementation)
    close(out, oracle.grouped_matmul(inputs.lhs, gate_f32, sizes))
    hidden = grouped_swiglu(lhs, gate, up, sizes, implementation=implementation)
    close(hidden, oracle.grouped_swiglu(inputs.lhs, gate_f32, up_f32, sizes))
    turned = BlockScaledWeights(up.values.mT, up.scales.mT)
    out = grouped_matmul(lhs, turned, sizes, transpose_rhs=True, implementation=implementation)
    close(out, oracle.grouped_matmul(inputs.lhs, up_f32, sizes))
    with pytest.raises(ValueError, match="rhs_GKN: BlockScaledWeights"):
        jax.grad(lambda lhs: grouped_matmul(lhs, gate, sizes, implementation=implementation).sum())(
            inputs.lhs
        )


@pytest.mark.parametrize("implementation", PORTABLE)
def test_layer_of_a_stack(implementation):
    case = Case("stack", 40, 24, 40, (10, 0, 30))
    layers = [make_inputs(case, seed) for seed in range(3)]
    gates, ups = (jnp.stack([getattr(x, n) for x in layers]) for n in ("rhs", "second_rhs"))
    lhs, sizes, layer = layers[0].lhs, layers[0].group_sizes, jnp.int32(1)
    gate, up = LayerOfStack(gates, layer), LayerOfStack(ups, layer)

    def call(lhs):
        return grouped_matmul(lhs, gate, sizes, implementation=implementation)

    close(call(lhs), oracle.grouped_matmul(lhs, layers[1].rhs, sizes))
    hidden = grouped_swiglu(lhs, gate, up, sizes, implementation=implementation)
    close(hidden, oracle.grouped_swiglu(lhs, layers[1].rhs, layers[1].second_rhs, sizes))
    with pytest.raises(ValueError, match="rhs_GKN: LayerOfStack of float32 have no gradient"):
        jax.grad(lambda lhs: call(lhs).sum())(lhs)
    for other in (up.take(), LayerOfStack(ups, jnp.int32(1))):
        with pytest.raises(ValueError, match=r"up_GKN: layer .* must be the same object"):
            grouped_swiglu(lhs, gate, other, sizes, implementation=implementation)


def test_rows_outside_the_groups_may_hold_anything():
    case = Case("garbage", 96, 64, 64, (20, 30, 10, 16), offset=1, num_held=2)
    inputs = make_inputs(case)
    outside = np.r_[0:20, 60:96]
    lhs = inputs.lhs.at[outside].set(jnp.nan)
    d_out = inputs.d_out.at[outside].set(jnp.inf)

    def call(lhs, rhs):
        return grouped_matmul(lhs, rhs, inputs.group_sizes, group_offset=1, implementation="xla")

    out, pull = jax.vjp(call, lhs, inputs.rhs)
    d_lhs, d_rhs = pull(d_out)
    close(out, oracle.grouped_matmul(inputs.lhs, inputs.rhs, inputs.group_sizes, offset=1))
    want = oracle.grouped_matmul_gradients(
        inputs.lhs, inputs.rhs, inputs.group_sizes, inputs.d_out, offset=1
    )
    close(d_lhs, want[0])
    close(d_rhs, want[1])


def test_inside_scan_and_remat():
    case = Case("stack", 60, 32, 32, (11, 0, 30, 19))
    layers = [make_inputs(case, seed) for seed in range(3)]
    sizes = layers[0].group_sizes
    stacked = jnp.stack([layer.rhs for layer in layers])

    def loss(lhs, stacked):
        @jax.checkpoint
        def block(rows, rhs):
            return rows + grouped_matmul(rows, rhs, sizes, implementation="xla"), None

        return (jax.lax.scan(block, lhs, stacked)[0] ** 2).sum()

    value, (d_lhs, d_stacked) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(
        layers[0].lhs, stacked
    )
    rows = [np.asarray(layers[0].lhs, np.float64)]
    for layer in layers:
        rows.append(rows[-1] + oracle.grouped_matmul(rows[-1], layer.rhs, sizes))
    np.testing.assert_allclose(value, (rows[-1] ** 2).sum(), rtol=1e-5)
    d_rows = 2 * rows[-1]
    for index in (2, 1, 0):
        through, d_rhs = oracle.grouped_matmul_gradients(
            rows[index], layers[index].rhs, sizes, d_rows
        )
        close(d_stacked[index], d_rhs)
        d_rows = d_rows + through
    close(d_lhs, d_rows)


def test_inside_shard_map_with_shared_weights():
    """Each shard has its own rows; the gradient of the weights they share is summed over shards."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    case = Case("sharded", 40, 16, 24, (10, 0, 25, 5))
    inputs = make_inputs(case)
    rows, whole = jax.P("data"), jax.P()

    def loss(lhs, gate, up):
        out = grouped_swiglu(lhs, gate, up, inputs.group_sizes, implementation="xla")
        return jax.lax.psum((out * inputs.d_out).sum(), "data")

    sharded = jax.shard_map(loss, mesh=mesh, in_specs=(rows, whole, whole), out_specs=whole)
    arrays = (inputs.lhs, inputs.rhs, inputs.second_rhs)
    gradients = jax.jit(jax.grad(sharded, argnums=(0, 1, 2)))(*arrays)
    wants = oracle.grouped_swiglu_gradients(*arrays, inputs.group_sizes, inputs.d_out)
    for got, want in zip(gradients, wants, strict=True):
        close(got, want)


def test_no_rows():
    rhs = jnp.ones((3, 8, 16))
    sizes = jnp.zeros(3, jnp.int32)
    out = grouped_matmul(jnp.ones((0, 8)), rhs, sizes, implementation="xla")
    assert out.shape == (0, 16)
    hidden = grouped_swiglu(jnp.ones((0, 8)), rhs, rhs, sizes, implementation="xla")
    assert hidden.shape == (0, 16)


def test_work_does_not_grow_with_the_number_of_groups():
    def loop_flops(num_groups):
        shapes = (
            jax.ShapeDtypeStruct((256, 64), jnp.float32),
            jax.ShapeDtypeStruct((num_groups, 64, 64), jnp.float32),
            jax.ShapeDtypeStruct((num_groups,), jnp.int32),
        )
        call = lambda *arrays: grouped_matmul(*arrays, implementation="xla")  # noqa: E731
        compiled = jax.jit(call).lower(*shapes).compile()
        # A loop's body is counted once: a tile's product, whatever the number of groups.
        cost = compiled.cost_analysis()
        assert cost is not None
        return cost["flops"]

    assert loop_flops(64) < loop_flops(4)


def swap(**changes):
    """Arguments of a sound call, with some exchanged."""
    arguments = {
        "lhs_MK": jnp.ones((4, 8)),
        "rhs_GKN": jnp.ones((2, 8, 16)),
        "group_sizes_G": jnp.array([1, 2]),
        "implementation": "xla",
    }
    return arguments | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"implementation": "cuda"}, "implementation: 'cuda' must be one of"),
        ({"lhs_MK": jnp.ones((4, 8, 1))}, "lhs_MK: shape"),
        ({"rhs_GKN": jnp.ones((2, 8, 16), jnp.bfloat16)}, "rhs_GKN: .* dtype bfloat16"),
        ({"rhs_GKN": jnp.ones((2, 9, 16))}, "rhs_GKN: dim 1 of shape .* lhs_MK's last, 8"),
        ({"transpose_rhs": True}, "rhs_GKN: dim 2 of shape"),
        ({"group_sizes_G": jnp.ones(2)}, "group_sizes_G: .* integers"),
        ({"group_sizes_G": jnp.array([1, 2, 1])}, "rhs_GKN: 2 groups must be as many"),
        (
            {"group_sizes_G": jnp.array([1]), "group_offset": 0},
            "rhs_GKN: 2 groups must be at least",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked_annotations")
def test_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        grouped_matmul(**swap(**changes))


@pytest.mark.usefixtures("unchecked_annotations")
def test_refuses_weights_that_do_not_fit():
    lhs, sizes = jnp.ones((4, 8)), jnp.array([1, 2])
    gate = jnp.ones((2, 8, 16))
    with pytest.raises(ValueError, match="up_GKN: shape"):
        grouped_swiglu(lhs, gate, gate[..., :8], sizes, implementation="xla")
    values, scales = jnp.ones((2, 8, 16), jnp.int8), jnp.ones((2, 1, 1))
    for broken, message in [
        (BlockScaledWeights(values, scales[:, :, :0]), "rhs_GKN.scales: shape"),
        (BlockScaledWeights(values, scales.astype(jnp.bfloat16)), "rhs_GKN.scales: dtype"),
        (BlockScaledWeights(gate, scales), "rhs_GKN.values: dtype"),
        (BlockScaledWeights(values[0], scales), "rhs_GKN.values: shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            grouped_matmul(lhs, broken, sizes, implementation="xla")
    with pytest.raises(ValueError, match="dtype: int16 must be"):
        block_scaled(gate, jnp.int16)
