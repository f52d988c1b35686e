"""Latent attention: meaning, gradients, transformations, errors."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels.mla_attention import (
    hopper,
    hopper_backward,
    hopper_forward,
    mla_attention,
    mla_attention_gradients,
    mla_attention_with_lse,
)
from pallas_kernels.mla_attention.arguments import Inputs, Masks
from pallas_kernels.mla_attention.cases import CASES, LARGE_CASES, Case
from pallas_kernels.mla_attention.hopper_ranges import key_ranges
from pallas_kernels.mla_attention.reference import visible_BTS
from tests import oracle_attention
from tests.oracle_attention import relative_error
from tests.pallas_kernels import hopper_simulator
from tests.pallas_kernels.attention_parts import CASE as PARTS
from tests.pallas_kernels.attention_parts import check_parts
from tests.pallas_kernels.comparisons import GRADIENTS, compare_attention


def keywords(case, masks):
    q_ids, k_ids, offset = masks
    return {
        "scale": case.scale,
        "causal": case.causal,
        "q_segment_ids_BT": q_ids,
        "kv_segment_ids_BS": k_ids,
        "q_offset_B": offset,
    }


def run(case, arrays, masks, d_out, implementation):
    """Returns (out, lse, grads) of one implementation, compiled."""

    @jax.jit
    def both(arrays, masks, d_out):
        attend = functools.partial(
            mla_attention_with_lse, **keywords(case, masks), implementation=implementation
        )
        out, pullback, lse = jax.vjp(attend, *arrays, has_aux=True)
        return out, lse, pullback(d_out)

    return both(arrays, masks, d_out)


def check(case, implementation, dtype, tolerance, seed):
    arrays, masks, d_out = case.draw(seed, dtype)
    results = run(case, arrays, masks, d_out, implementation)
    compare_attention(case, arrays, masks, d_out, results, tolerance)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_float32(case, implementation):
    check(case, implementation, jnp.float32, 1e-5, seed=len(case.name))


@pytest.mark.parametrize("case", CASES[2::5], ids=lambda case: case.name)
def test_bfloat16(case):
    check(case, "xla", jnp.bfloat16, 5e-3, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("case", LARGE_CASES, ids=lambda case: case.name)
def test_many_blocks(case):
    check(case, "xla", jnp.float32, 1e-5, seed=2)


@pytest.mark.parametrize("own", [0, 1])
def test_parts_of_the_keys_add_up(own):
    options: dict[str, Any] = {"scale": PARTS.scale, "implementation": "xla"}

    def forward(inputs, masks):
        return mla_attention_with_lse(*inputs, **keywords(PARTS, masks), implementation="xla")

    backward = functools.partial(mla_attention_gradients, **options)
    check_parts(own, 6, jnp.float32, 1e-5, jax.jit(forward), jax.jit(backward))
    arrays, masks, d_out = Case("small").draw(1)
    kept: Any = (arrays, masks, *mla_attention_with_lse(*arrays, **options), d_out)
    with pytest.raises(ValueError, match="'reference' must see all keys at once"):
        mla_attention_gradients(*kept, **options | {"implementation": "reference"})


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_other_dims(implementation):
    case = Case("small", batch=2, queries=5, keys=5)
    arrays, masks, _ = case.draw(3, dims=(16, 8, 24))
    out = mla_attention(*arrays, scale=0.3, implementation=implementation)
    want, _ = oracle_attention.attend(*arrays, *masks, scale=0.3, causal=True)
    assert relative_error(out, want) < 1e-5


def test_transformations():
    """Under checkpoint, scan and vmap over another batch dim: the same values and gradients."""
    case = Case("t", batch=4, queries=33, keys=33, num_segments=2)
    arrays, masks, d_out = case.draw(4, dims=(16, 8, 16))
    out, _, grads = run(case, arrays, masks, d_out, "xla")

    def attend(arrays, masks):
        return mla_attention(*arrays, **keywords(case, masks), implementation="xla")

    def split(tree):
        return jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), tree)

    def scanned(arrays):
        body = jax.checkpoint(attend)
        _, outs = jax.lax.scan(lambda _, args: (None, body(*args)), None, split((arrays, masks)))
        return outs.reshape(out.shape)

    def mapped(arrays):
        return jax.vmap(attend)(split(arrays), split(masks)).reshape(out.shape)

    for function in (scanned, mapped):
        got, pullback = jax.vjp(jax.jit(function), arrays)
        assert relative_error(got, out) < 1e-6
        for actual, want in zip(pullback(d_out)[0], grads, strict=True):
            assert relative_error(actual, want) < 1e-6

    # An argument that all mapped calls share gets the sum of their gradients.
    q_nope, *rest = arrays
    shared = jax.vmap(lambda q, k: attend((q, *rest[:2], k, rest[3]), masks), in_axes=(0, None))
    q2 = jnp.stack([q_nope, 2 * q_nope])
    got = jax.vjp(lambda k: shared(q2, k), rest[2])[1](jnp.stack([d_out, d_out]))[0]
    want = sum(run(case, (q, *rest), masks, d_out, "xla")[2][3] for q in q2)
    assert relative_error(got, want) < 1e-6


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(check_vma):
    """Heads over one manual axis, sequences over another; shared gradients are summed."""
    if len(jax.devices()) < 4:
        pytest.skip(f"needs 4 devices, got {len(jax.devices())}")
    case = Case("s", batch=2, queries=20, keys=20, heads=4, num_segments=2)
    arrays, masks, d_out = case.draw(5, dims=(16, 8, 16))
    out, _, grads = run(case, arrays, masks, d_out, "xla")
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    heads, shared = P("data", None, "tensor"), P("data")

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=((heads, heads, heads, shared, heads), (shared, shared, None)),
        out_specs=heads,
        check_vma=check_vma,
    )
    def attend(arrays, masks):
        return mla_attention(*arrays, **keywords(case, masks), implementation="xla")

    got, pullback = jax.vjp(lambda *arrays: attend(arrays, masks), *arrays)
    assert relative_error(got, out) < 1e-6
    for name, actual, want in zip(GRADIENTS, pullback(d_out), grads, strict=True):
        assert relative_error(actual, want) < 1e-6, name


def test_residuals_grow_with_the_tokens():
    """Twice the tokens hold about twice the bytes, between the passes and within them."""
    sizes = []
    for tokens in (2048, 4096):
        shapes = [
            (1, tokens, 1, 16),
            (1, tokens, 1, 8),
            (1, tokens, 1, 16),
            (1, tokens, 8),
            (1, tokens, 1, 16),
        ]
        args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]

        def loss(*arrays):
            return mla_attention(*arrays, scale=0.2, implementation="xla").sum()

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4))).lower(*args).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        sizes.append(memory.temp_size_in_bytes)
        _, residuals = jax.eval_shape(lambda *a: jax.vjp(loss, *a), *args)
        held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(residuals))
        # The inputs, the output, the log-sum-exp.
        assert held <= 4 * tokens * (16 + 8 + 16 + 8 + 16 + 16 + 1)
    assert sizes[1] < 2.2 * sizes[0]


def test_errors_name_the_argument():
    arrays, _, _ = Case("e", queries=4, keys=4).draw(6, dims=(16, 8, 16))
    ids = jnp.zeros((1, 4), jnp.int32)
    attend = functools.partial(mla_attention, scale=1.0, implementation="xla")
    with pytest.raises(ValueError, match="kv_segment_ids_BS: None must be"):
        attend(*arrays, q_segment_ids_BT=ids)
    with pytest.raises(ValueError, match="q_segment_ids_BT: None must be"):
        attend(*arrays, kv_segment_ids_BS=ids)
    with pytest.raises(ValueError, match="q_offset_B: must be None"):
        attend(*arrays, q_offset_B=ids[0, :1], causal=False)
    with pytest.raises(ValueError, match="implementation: 'triton' must be one of"):
        mla_attention(*arrays, scale=1.0, implementation="triton")
    mixed = (*arrays[:3], arrays[3].astype(jnp.bfloat16), arrays[4])
    with pytest.raises(ValueError, match="k_rope_BSR: dtype bfloat16 must be"):
        attend(*mixed)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("case", CASES + LARGE_CASES, ids=lambda case: case.name)
def test_hopper(case):
    check(case, "hopper", jnp.bfloat16, 5e-3, seed=11)


SIMULATED = (
    "one_token",
    "65",
    "129_full",
    "foreign",
    "offset_negative",
    "offset_segments",
    "scores_of_hundreds",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name in SIMULATED], ids=lambda case: case.name
)
def test_hopper_simulated(case, monkeypatch):
    """The kernels' bodies on NumPy arrays give the oracle's values, and all barriers agree."""
    monkeypatch.setattr(
        jaxtyping.config, "jaxtyping_disable", True
    )  # NumPy's arrays, and stand-ins.
    for module in (hopper_forward, hopper_backward):
        hopper_simulator.simulate(module, monkeypatch, allocates=True)
    arrays, masks, d_out = case.draw(12, jnp.bfloat16)
    options = {"scale": case.scale, "causal": case.causal}
    inputs, masks = Inputs(*arrays), Masks(*masks)
    out, lse = hopper.forward(inputs, masks, **options)
    grads = hopper.backward(inputs, masks, out, lse, d_out, **options)
    compare_attention(case, arrays, masks, d_out, (out, lse, grads), 5e-3)


LOWERED = (
    Case("300", batch=2, queries=300, keys=300),
    Case("full", queries=256, keys=256, causal=False),
    Case("all_masks", batch=2, queries=100, keys=260, num_segments=3, offsets=(160, 140)),
)


@pytest.mark.slow
@pytest.mark.parametrize("case", LOWERED, ids=lambda case: case.name)
def test_hopper_lowers_without_a_gpu(case):
    """Shared memory, shapes of products, layouts: all that Mosaic checks before a GPU is there."""
    arrays, masks, d_out = case.draw(8, jnp.bfloat16)

    def both(arrays, masks, d_out):
        attend = functools.partial(mla_attention, **keywords(case, masks), implementation="hopper")
        out, pullback = jax.vjp(attend, *arrays)
        return out, pullback(d_out)

    lowered = jax.jit(both).trace(arrays, masks, d_out).lower(lowering_platforms=("cuda",))
    out, grads = lowered.out_info
    assert out.shape == d_out.shape
    assert [grad.shape for grad in grads] == [array.shape for array in arrays]
    assert lowered.as_text().count("@mosaic_gpu_v2") == 2


@pytest.mark.parametrize("q_size", [64, 128])
@pytest.mark.parametrize("case", [*CASES, "shuffled"], ids=lambda case: getattr(case, "name", case))
def test_key_ranges(case, q_size):
    """Blocks outside of the ranges are hidden in whole, full ones are visible in whole."""
    k_size = 128
    shuffled = case == "shuffled"
    case = Case("shuffled", batch=3, queries=700, keys=700, num_segments=4) if shuffled else case
    B, T, S = case.batch, case.queries, case.keys
    (q_ids, k_ids, offset) = case.draw(9, dims=(1, 1, 1))[1]
    if shuffled:
        q_ids = k_ids = jax.random.permutation(jax.random.key(0), k_ids, axis=1, independent=True)
    num_q, num_k = -(-T // 128) * 128 // q_size, -(-S // k_size)
    of_queries, of_keys = key_ranges(
        num_q * q_size, S, q_size, k_size, q_ids, k_ids, offset, causal=case.causal, batch=B
    )
    seen = visible_BTS(jnp.arange(T), jnp.arange(S), q_ids, k_ids, offset, causal=case.causal)
    visible = np.broadcast_to(seen, (B, T, S))
    for b, i, j in np.ndindex(B, num_q, num_k):
        block = visible[b, i * q_size : (i + 1) * q_size, j * k_size : (j + 1) * k_size]
        in_queries = of_queries.start_BI[b, i] <= j < of_queries.stop_BI[b, i]
        assert in_queries == (of_keys.start_BI[b, j] <= i < of_keys.stop_BI[b, j])
        assert in_queries or not block.any()
        full = of_queries.full_start_BI[b, i] <= j < of_queries.full_stop_BI[b, i]
        full |= of_keys.full_start_BI[b, j] <= i < of_keys.full_stop_BI[b, j]
        assert not full or (block.all() and (j + 1) * k_size <= S)
    assert (of_queries.stop_BI > of_queries.start_BI).all()
    assert (np.diff(of_queries.start_BI) >= 0).all()
    assert (np.diff(of_queries.stop_BI) >= 0).all()


def test_hopper_errors_name_the_argument():
    case = Case("e", queries=4, keys=4)
    attend = functools.partial(mla_attention, scale=1.0, implementation="hopper")
    arrays = case.draw(10, jnp.bfloat16)[0]
    with pytest.raises(ValueError, match="nope dim 64 must be 128"):
        attend(*case.draw(10, jnp.bfloat16, dims=(64, 64, 128))[0])
    with pytest.raises(ValueError, match="rope dim 32 must be 64"):
        attend(*case.draw(10, jnp.bfloat16, dims=(128, 32, 128))[0])
    with pytest.raises(ValueError, match="value dim 64 must be 128"):
        attend(*case.draw(10, jnp.bfloat16, dims=(128, 64, 64))[0])
    with pytest.raises(ValueError, match="dtype float32 must be bfloat16 or float16"):
        attend(*case.draw(10, jnp.float32)[0])
    with pytest.raises(ValueError, match=r"scale: -1\.0 must be positive"):
        mla_attention(*arrays, scale=-1.0, implementation="hopper")
