"""Absorbed decode: meaning, the append, merged shards, transformations, errors."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels.mla_decode import (
    IMPLEMENTATIONS,
    LatentPages,
    append_latents,
    merge_partial_attention,
    mla_decode,
)
from pallas_kernels.mla_decode.cases import CASES, ODD_CASES, Case
from pallas_kernels.quantised import row_scaled
from tests import oracle_decode
from tests.oracle_decode import relative_error
from tests.pallas_kernels.comparisons import compare_decode

PORTABLE = ("reference", "xla")
FLOAT8 = jnp.float8_e4m3fn


def run(case, arguments, implementation):
    decode = functools.partial(mla_decode, scale=case.scale, implementation=implementation)
    return jax.jit(decode)(*arguments)


def check(case, arguments, implementation, tolerance):
    compare_decode(case, arguments, run(case, arguments, implementation), tolerance)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("implementation", PORTABLE)
def test_float32(case, implementation):
    check(case, case.draw(seed=1, dims=(128, 32)), implementation, 1e-5)


@pytest.mark.parametrize("case", ODD_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("implementation", PORTABLE)
def test_odd_shapes(case, implementation):
    check(case, case.draw(seed=2, dims=(24, 10)), implementation, 1e-5)


@pytest.mark.parametrize("case", CASES[1:12:3], ids=lambda case: case.name)
@pytest.mark.parametrize("implementation", PORTABLE)
def test_bfloat16(case, implementation):
    check(case, case.draw(seed=3, dtype=jnp.bfloat16), implementation, 5e-3)


@pytest.mark.parametrize("case", CASES[1:12:3], ids=lambda case: case.name)
@pytest.mark.parametrize("pages_dtype", [jnp.int8, FLOAT8], ids=["int8", "float8"])
@pytest.mark.parametrize("implementation", PORTABLE)
def test_quantized(case, pages_dtype, implementation):
    """Against the oracle on the dequantised latents, so only the arithmetic is judged."""
    arguments = case.draw(seed=4, pages_dtype=pages_dtype, dims=(128, 32))
    check(case, arguments, implementation, 1e-5)


def test_quantized_bfloat16():
    case = CASES[3]
    arguments = case.draw(seed=5, dtype=jnp.bfloat16, pages_dtype=jnp.int8)
    check(case, arguments, "xla", 5e-3)


def test_what_is_not_cached_may_be_nan():
    """Slots after the end of a sequence and pages that are not its own never reach the output."""
    case = Case("nan", (70, 0, 3), num_tokens=2)
    clean, poisoned = (case.draw(seed=6, dims=(32, 16), unused=by) for by in (1, np.nan))
    for implementation in PORTABLE:
        compare_decode(case, clean, run(case, poisoned, implementation), 1e-5)


@pytest.mark.parametrize("implementation", PORTABLE)
def test_a_scale_may_be_zero_or_negative_and_unused_ones_anything(implementation):
    """The latent's sign turns with its scale's; NaN in a slot without a token reaches nothing."""
    case = Case("scales", (70, 0, 3), num_tokens=2)
    arguments: list[Any] = list(case.draw(seed=6, dims=(32, 16), pages_dtype=jnp.int8))
    pages, table, lengths = arguments[2:]
    scale, used = np.array(pages.scale), np.zeros(pages.scale.shape, bool)
    scale[:, ::3] *= -1
    scale[:, ::4] = 0
    for b, length in enumerate(np.asarray(lengths)):
        for position in range(length):
            used[table[b, position // 64], position % 64] = True
    arguments[2] = dataclasses.replace(pages, scale=jnp.asarray(scale))
    poisoned = dataclasses.replace(pages, scale=jnp.asarray(np.where(used, scale, np.nan)))
    results = run(case, (*arguments[:2], poisoned, table, lengths), implementation)
    compare_decode(case, arguments, results, 1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_table_of_no_columns_holds_no_key(implementation):
    """As of a shard of the pages that none of a sequence's are on; no kernel is started."""
    arguments: list[Any] = list(Case("none", (70, 0)).draw(seed=6, dtype=jnp.bfloat16))
    arguments[3] = arguments[3][:, :0]
    case = Case("none", (70, 0))
    out, lse = run(case, arguments, implementation)
    assert out.dtype == jnp.bfloat16
    assert not out.any()
    assert np.isneginf(lse).all()
    pages, table, zero = arguments[2], arguments[3], jnp.zeros(2, jnp.int32)
    new = jnp.ones((2, 1, 512), jnp.bfloat16), jnp.ones((2, 1, 64), jnp.bfloat16)
    same = append_latents(pages, *new, table, zero, zero + 1)
    jax.tree.map(np.testing.assert_array_equal, same, pages)


def pool(dtype, num_pages=12, page_size=4, dims=(8, 6)):
    rng = np.random.default_rng(8)
    pages = LatentPages.zeros(num_pages, page_size, *dims, dtype=dtype)
    latent = jnp.asarray(rng.normal(size=pages.latent.shape), jnp.float32)
    rope = jnp.asarray(rng.normal(size=pages.rope.shape), pages.rope.dtype)
    if pages.scale is None:
        return LatentPages(latent.astype(dtype), rope)
    values, scale = row_scaled(latent, dtype)
    return LatentPages(values, rope, scale)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8, FLOAT8])
def test_append_writes_its_tokens_and_nothing_else(dtype):
    pages = pool(dtype)
    rng = np.random.default_rng(9)
    latent = jnp.asarray(rng.normal(size=(4, 5, 8)), jnp.bfloat16)
    rope = jnp.asarray(rng.normal(size=(4, 5, 6)), jnp.bfloat16)
    table = np.array([[3, 7, 1], [0, 11, 4], [2, 5, 6], [8, 9, 10]], np.int32)
    start, count = np.array([2, 7, 11, 0]), np.array([5, 3, 1, 0])
    values, scale = latent, None
    if pages.scale is not None:
        values, scale = row_scaled(latent, dtype)
    want = jax.tree.map(np.array, pages)
    for b in range(4):
        for t in range(count[b]):
            page, slot = table[b, (start[b] + t) // 4], (start[b] + t) % 4
            want.latent[page, slot] = np.asarray(values[b, t].astype(dtype))
            want.rope[page, slot] = np.asarray(rope[b, t].astype(pages.rope.dtype))
            if scale is not None:
                want.scale[page, slot] = scale[b, t]
    got = jax.jit(append_latents)(pages, latent, rope, table, start, count)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_append_writes_nothing_outside_of_its_table():
    """Past the table's end, and before its start where another pool has a sequence's beginning."""
    pages = pool(jnp.float32)
    latent, rope = jnp.ones((3, 5, 8)), jnp.ones((3, 5, 6))
    table = jnp.array([[3, 7], [0, 11], [2, 5]], jnp.int32)
    start, count = jnp.array([6, -3, 2**31 - 3]), jnp.array([5, 5, 2])
    got = jax.jit(append_latents)(pages, latent, rope, table, start, count)
    want = jax.tree.map(np.array, pages)
    for page, slots in ((7, [2, 3]), (0, [0, 1])):
        want.latent[page, slots], want.rope[page, slots] = 1, 1
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_append_writes_to_no_page_that_the_pool_does_not_have():
    """Entries of the table that stand for no page: -1, which is not the last one, and 12 of 12."""
    pages = pool(jnp.float32)
    latent, rope = jnp.ones((2, 5, 8)), jnp.ones((2, 5, 6))
    table = jnp.array([[3, -1], [12, 5]], jnp.int32)
    got = append_latents(pages, latent, rope, table, jnp.array([2, 2]), jnp.array([5, 5]))
    want = jax.tree.map(np.array, pages)
    for page, slots in ((3, [2, 3]), (5, [0, 1, 2])):
        want.latent[page, slots], want.rope[page, slots] = 1, 1
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_pool_of_whole_lanes_gives_the_same():
    """Rotary keys of 64 in a pool of 128: the append writes zeros after them."""
    case = Case("lanes", (20, 5), num_heads=2, page_size=8)
    q_latent, q_rope, pages, table, lengths = case.draw(seed=21, dims=(16, 64))
    rng = np.random.default_rng(22)
    latent = jnp.asarray(rng.normal(size=(2, 20, 16)), jnp.float32)
    rope = jnp.asarray(rng.normal(size=(2, 20, 64)), jnp.float32)
    results = []
    for lanes in (64, 128):
        empty = jnp.full((*pages.rope.shape[:2], lanes), jnp.nan)
        new = LatentPages(jnp.full_like(pages.latent, jnp.nan), empty)
        new = append_latents(new, latent, rope, table, jnp.zeros(2, jnp.int32), lengths)
        results.append(run(case, (q_latent, q_rope, new, table, lengths), "xla"))
        if lanes == 128:
            assert not new.rope[table[0, :2], :, 64:].any()
    for narrow, wide in zip(*results, strict=True):
        np.testing.assert_allclose(wide, narrow, rtol=1e-6)
    with pytest.raises(ValueError, match="q_rope_BTHR: shape"):
        mla_decode(
            q_latent, q_rope[..., :63], pages, table, lengths, scale=1.0, implementation="xla"
        )


def test_append_is_in_place():
    """Donated, or carried in a scan, the pool is updated where it lies: no second pool is made."""
    pages = LatentPages.zeros(512, 64, 32, 16, dtype=jnp.float32)
    pool_bytes = sum(x.nbytes for x in jax.tree.leaves(pages))
    table = jnp.arange(8, dtype=jnp.int32).reshape(2, 4)

    def steps(pages, latent_NBTC, rope_NBTR, start_B):
        def step(carry, new):
            pages, start_B = carry
            latent_BTC, rope_BTR = new
            pages = append_latents(
                pages, latent_BTC, rope_BTR, table, start_B, jnp.ones(2, jnp.int32)
            )
            return (pages, start_B + 1), None

        return jax.lax.scan(step, (pages, start_B), (latent_NBTC, rope_NBTR))[0]

    latent = jax.random.normal(jax.random.key(0), (5, 2, 1, 32))
    rope = jax.random.normal(jax.random.key(1), (5, 2, 1, 16))
    start = jnp.array([0, 62])
    compiled = jax.jit(steps, donate_argnums=0).lower(pages, latent, rope, start).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes >= pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes / 10
    (pages, _) = compiled(pages, latent, rope, start)
    written = pages.latent.reshape(8 * 64 * 64, 32)
    np.testing.assert_array_equal(written[:5], latent[:, 0, 0])
    np.testing.assert_array_equal(pages.latent[4, 62:], latent[:2, 1, 0])
    np.testing.assert_array_equal(pages.latent[5, :3], latent[2:, 1, 0])


def test_append_then_decode():
    """Tokens appended one by one and decoded are what attention over the raw latents gives."""
    case = Case("steps", (70, 3, 0), num_tokens=1, num_heads=4, page_size=16)
    q_latent, q_rope, pages, table, lengths = case.draw(seed=10, dims=(32, 16))
    rng = np.random.default_rng(11)
    latent = jnp.asarray(rng.normal(size=(3, 70, 32)), jnp.float32)
    rope = jnp.asarray(rng.normal(size=(3, 70, 16)), jnp.float32)
    table = jnp.asarray(rng.permutation(15).reshape(3, 5), jnp.int32)
    pages = LatentPages.zeros(15, 16, 32, 16, dtype=jnp.float32)
    first = jnp.minimum(lengths, 2)
    zero = jnp.zeros(3, jnp.int32)
    pages = append_latents(pages, latent, rope, table, zero, first)
    rest = lengths - first
    pages = append_latents(pages, latent[:, 2:], rope[:, 2:], table, first, rest)
    out, lse = run(case, (q_latent, q_rope, pages, table, lengths), "xla")
    whole = LatentPages(latent, rope)
    each = jnp.arange(3)[:, None]
    want = oracle_decode.decode(q_latent, q_rope, whole, each, lengths, scale=case.scale)
    assert relative_error(out, want[0]) < 1e-5
    assert relative_error(lse, want[1]) < 1e-5


@pytest.mark.parametrize("implementation", PORTABLE)
def test_merged_shards_equal_the_whole(implementation):
    """Two halves of the page table, each with the length counted from its own first token."""
    case = Case("shards", (500, 100, 256, 0, 257), num_tokens=2, table_pages=8)
    q_latent, q_rope, pages, table, lengths = case.draw(seed=12, dims=(64, 16))
    halves = [
        run(case, (q_latent, q_rope, pages, table[:, s : s + 4], lengths - s * 64), implementation)
        for s in (0, 4)
    ]
    outs, lses = (jnp.stack(x) for x in zip(*halves, strict=True))
    out, lse = merge_partial_attention(outs, lses)
    want = oracle_decode.decode(q_latent, q_rope, pages, table, lengths, scale=case.scale)
    assert relative_error(out, want[0]) < 1e-5
    assert relative_error(lse, want[1]) < 1e-5


@pytest.mark.usefixtures("unchecked_annotations")
def test_merge_of_nothing():
    outs, lses = jnp.zeros((2, 3, 4)), jnp.full((2, 3), -jnp.inf)
    out, lse = merge_partial_attention(outs, lses)
    np.testing.assert_array_equal(out, np.zeros((3, 4)))
    np.testing.assert_array_equal(lse, np.full(3, -np.inf))
    with pytest.raises(ValueError, match="lses"):
        merge_partial_attention(outs, lses[:, :2])


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
@pytest.mark.parametrize("implementation", PORTABLE)
def test_shard_map(implementation):
    """Batch over one mesh axis, heads over the other, no collectives needed."""
    ways = 2 if jax.device_count() >= 4 else 1
    mesh = jax.make_mesh(
        (2, ways), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    case = Case("sharded", (65, 0, 130, 7), num_tokens=2, num_heads=4)
    arguments = case.draw(seed=13, dims=(32, 16))
    heads = P("data", None, "tensor")
    decode = functools.partial(mla_decode, scale=case.scale, implementation=implementation)
    sharded = jax.shard_map(
        decode,
        mesh=mesh,
        in_specs=(heads, heads, P(), P("data"), P("data")),
        out_specs=(heads, heads),
    )
    out, lse = jax.jit(sharded)(*arguments)
    want = oracle_decode.decode(*arguments, scale=case.scale)
    assert relative_error(out, want[0]) < 1e-5
    assert relative_error(lse, want[1]) < 1e-5


def test_xla_gathers_a_block_at_a_time():
    """Memory for a long context is bounded by a block of pages, not by the page table."""
    case = Case("memory", (64 * 1024,), num_heads=16)
    arguments = case.draw(seed=14, dims=(64, 16))
    decode = functools.partial(mla_decode, scale=case.scale, implementation="xla")
    memory = jax.jit(decode).lower(*arguments).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < arguments[2].latent.nbytes / 8


def replace(arguments, index, change):
    arguments = list(arguments)
    arguments[index] = change(arguments[index])
    return arguments


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, lambda q: q[0], "q_latent_BTHC: shape"),
        (0, lambda q: q[..., :8], "q_latent_BTHC: shape"),
        (1, lambda q: q[:, :, :2], "q_rope_BTHR: shape"),
        (1, lambda q: q.astype(jnp.bfloat16), "q_rope_BTHR: dtype bfloat16"),
        (2, lambda p: dataclasses.replace(p, latent=p.latent[0]), "pages.latent: shape"),
        (
            2,
            lambda p: dataclasses.replace(p, latent=p.latent[:0]),
            r"pages.latent: .* be empty",
        ),
        (2, lambda p: dataclasses.replace(p, rope=p.rope[:, :3]), "pages.rope: shape"),
        (2, lambda p: dataclasses.replace(p, rope=p.rope.astype(FLOAT8)), "pages.rope: dtype"),
        (
            2,
            lambda p: dataclasses.replace(p, latent=p.latent.astype(jnp.int32)),
            "pages.latent: dtype",
        ),
        (
            2,
            lambda p: dataclasses.replace(p, latent=p.latent.astype(jnp.int8)),
            "pages.scale: None",
        ),
        (2, lambda p: dataclasses.replace(p, scale=p.latent[..., 0]), "pages.scale: must be None"),
        (
            2,
            lambda p: LatentPages(
                p.latent.astype(jnp.int8), p.rope, p.latent[..., 0].astype(jnp.bfloat16)
            ),
            "pages.scale: dtype bfloat16 must be float32",
        ),
        (3, lambda table: table[:1], "page_table_BP: shape"),
        (3, lambda table: table.astype(jnp.float32), "page_table_BP: dtype"),
        (4, lambda lengths: lengths[:1], "lengths_B: shape"),
        (4, lambda lengths: lengths.astype(jnp.float32), "lengths_B: dtype"),
    ],
)
@pytest.mark.usefixtures("unchecked_annotations")
def test_errors_name_the_argument(index, change, message):
    arguments = Case("bad", (20, 3), num_heads=4, page_size=16).draw(seed=15, dims=(16, 8))
    with pytest.raises(ValueError, match=message):
        mla_decode(*replace(arguments, index, change), scale=1.0, implementation="xla")


@pytest.mark.parametrize("scale", [0.0, -1.0, np.inf, np.nan])
def test_scale_must_be_positive_and_finite(scale):
    arguments = Case("bad", (20,), num_heads=4).draw(seed=16, dims=(16, 8))
    with pytest.raises(ValueError, match=r"scale: .* must be positive and finite"):
        mla_decode(*arguments, scale=scale, implementation="xla")


def test_unknown_implementation():
    arguments = Case("bad", (20,), num_heads=4).draw(seed=16, dims=(16, 8))
    with pytest.raises(ValueError, match="implementation: 'fast' must be one of"):
        mla_decode(*arguments, scale=1.0, implementation="fast")


@pytest.mark.usefixtures("unchecked_annotations")
def test_append_errors_name_the_argument():
    pages, table, zero = pool(jnp.float32), jnp.zeros((2, 3), jnp.int32), jnp.zeros(2, jnp.int32)
    latent, rope = jnp.zeros((2, 4, 8)), jnp.zeros((2, 4, 6))
    with pytest.raises(ValueError, match="latent_BTC: shape"):
        append_latents(pages, latent[..., :3], rope, table, zero, zero)
    with pytest.raises(ValueError, match="rope_BTR: shape"):
        append_latents(pages, latent, rope[:, :3], table, zero, zero)
    with pytest.raises(ValueError, match="start_B: shape"):
        append_latents(pages, latent, rope, table, zero[:1], zero)
    with pytest.raises(ValueError, match="num_tokens_B: dtype"):
        append_latents(pages, latent, rope, table, zero, zero.astype(jnp.float32))
