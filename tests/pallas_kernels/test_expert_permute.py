"""Tokens spread to rows sorted by expert and summed back: meaning, gradients, the Hopper kernel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.expert_permute import combine_rows, gather_rows, sort_by_expert
from pallas_kernels.expert_permute.cases import CASES, KERNEL_CASES, MODELS
from pallas_kernels.expert_permute.order import MOST_COMPARED


@pytest.mark.core
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_permutation_and_its_gradients(implementation, case, rng):
    """Both ways, forward and backward, against sums over the experts of each token."""
    experts = case.num_experts
    gather, combine = (
        functools.partial(op, implementation=implementation) for op in (gather_rows, combine_rows)
    )
    indices = case.draw(rng)
    there = indices < experts
    assert 0 < there.sum() <= (case.max_rows or indices.size)
    x, probe = rng.standard_normal((2, case.tokens, case.width)).astype(np.float32)
    gates = rng.random(indices.shape).astype(np.float32)
    scale = rng.standard_normal(experts).astype(np.float32)

    @jax.jit
    def run(x_ND, gates_NK):
        order = sort_by_expert(jnp.asarray(indices), experts, case.max_rows)
        expert_M = jnp.repeat(
            jnp.append(scale, 0),  # rows that are no expert's give 0, as the grouped matmul has it
            jnp.append(order.group_sizes_E, order.token_M.size - order.group_sizes_E.sum()),
            total_repeat_length=order.token_M.size,
        )
        out, pull = jax.vjp(
            lambda x, g: combine(gather(x, order) * expert_M[:, None], g, order),
            x_ND,
            gates_NK,
        )
        return out, *pull(jnp.asarray(probe)), order.token_M, order.group_sizes_E

    out, d_x, d_gates, token, sizes = map(np.asarray, run(x, gates))
    scale_of = np.where(there, np.append(scale, 0)[indices], 0)
    factor = np.sum(gates * scale_of, axis=1, keepdims=True)
    np.testing.assert_allclose(out, x * factor, rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(d_x, probe * factor, rtol=2e-6, atol=1e-6)
    want = np.sum(x * probe, axis=1, keepdims=True) * scale_of
    np.testing.assert_allclose(d_gates, want, rtol=2e-6, atol=2e-6)
    np.testing.assert_array_equal(sizes, np.bincount(indices.ravel(), minlength=experts)[:experts])
    want = np.argsort(indices.ravel(), kind="stable")[: sizes.sum()] // case.top_k
    np.testing.assert_array_equal(token[: sizes.sum()], want)
    assert token.shape == ((case.max_rows or indices.size),)


@pytest.mark.parametrize("assignments", [MOST_COMPARED - 2, MOST_COMPARED + 2])
def test_comparing_gives_the_order_of_sorting(assignments, rng):
    """Below the number from which all sort, and above it."""
    indices = jnp.asarray(rng.integers(0, 12, (assignments // 2, 2)), jnp.int32)
    for max_rows in (None, assignments - 1):
        want = sort_by_expert(indices, 11, max_rows)
        got = jax.jit(lambda i, m=max_rows: sort_by_expert(i, 11, m, compare=True))(indices)
        for ours, theirs in zip(got, want, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.fixture
def simulated(monkeypatch):
    """Kernels for Hopper run on the CPU, by JAX's simulator."""
    kernel = functools.partial(plgpu.kernel, interpret=plgpu.InterpretGPUParams())
    monkeypatch.setattr(plgpu, "kernel", kernel)


@pytest.mark.core
@pytest.mark.parametrize(
    ("dtype", "case"), [*zip(("bfloat16", "float32"), KERNEL_CASES, strict=True)], ids=str
)
def test_kernel_is_the_gathers(dtype, case, simulated, rng):
    """All rows that there are, in the same order."""
    indices = case.draw(rng)
    assert 0 < (indices < case.num_experts).sum() <= (case.max_rows or indices.size)
    x, probe = jnp.asarray(rng.standard_normal((2, case.tokens, case.width)), dtype)
    gates = jnp.asarray(rng.random(indices.shape), jnp.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def run(implementation, x_ND, gates_NK):
        order = sort_by_expert(jnp.asarray(indices), case.num_experts, case.max_rows)

        def both(x_ND, gates_NK):
            rows_MD = gather_rows(x_ND, order, implementation=implementation)
            return rows_MD, combine_rows(rows_MD, gates_NK, order, implementation=implementation)

        (rows_MD, out_ND), pull = jax.vjp(both, x_ND, gates_NK)
        return rows_MD, out_ND, *pull((jnp.zeros_like(rows_MD), probe))

    got, want = run("hopper", x, gates), run("xla", x, gates)
    assert np.abs(np.asarray(want[0], np.float32)).sum() > 0
    for ours, theirs in zip(got, want, strict=True):
        # Copies are the same bit by bit; sums may be fused in other ways.
        np.testing.assert_allclose(
            np.asarray(ours, np.float64), np.asarray(theirs, np.float64), rtol=2e-6
        )
    np.testing.assert_array_equal(np.asarray(got[0]), np.asarray(want[0]))


@pytest.mark.parametrize("case", MODELS, ids=str)
def test_kernel_lowers(case):
    """For CUDA, forward and backward one kernel each."""
    x = jax.ShapeDtypeStruct((case.tokens, case.width), jnp.bfloat16)
    gates = jax.ShapeDtypeStruct((case.tokens, case.top_k), jnp.float32)
    indices = jax.ShapeDtypeStruct((case.tokens, case.top_k), jnp.int32)

    def run(x_ND, gates_NK, indices_NK):
        order = sort_by_expert(indices_NK, case.num_experts)
        rows_MD, pull = jax.vjp(lambda x: gather_rows(x, order, implementation="hopper"), x_ND)
        combine = functools.partial(combine_rows, implementation="hopper")
        out_ND, pull_combine = jax.vjp(
            lambda rows, gates: combine(rows, gates, order), rows_MD, gates_NK
        )
        d_rows_MD, d_gates_NK = pull_combine(out_ND)
        return pull(d_rows_MD), d_gates_NK

    lowered = jax.jit(run).trace(x, gates, indices).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("mosaic_gpu_v2") == 2


@pytest.mark.parametrize(
    ("implementation", "width", "message"),
    [("hopper", 192, "width 192 must be a multiple of 128"), ("cuda", 128, "implementation: 'cud")],
)
def test_refuses(implementation, width, message):
    order = sort_by_expert(jnp.zeros((4, 1), jnp.int32), 2)
    with pytest.raises(ValueError, match=message):
        gather_rows(jnp.zeros((4, width)), order, implementation=implementation)
    with pytest.raises(ValueError, match=message):
        combine_rows(jnp.zeros((4, width)), jnp.ones((4, 1)), order, implementation=implementation)
