"""Random cases of every op against float64, with values that reach extremes.

A few fixed seeds run each time. `DSJAX_RANDOM_CASES=200` runs that many of each op and
implementation, from seed `DSJAX_RANDOM_SEED` (0). The seed of a case stands in its test's name, and
what it drew beneath its failure: `DSJAX_RANDOM_CASES=1 DSJAX_RANDOM_SEED=17 pytest
tests/pallas_kernels/test_random_cases.py` runs case 17 of each again, alone.
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import expert_permute, grouped_matmul, mla_attention, mla_decode
from pallas_kernels.expert_permute import sort_by_expert
from pallas_kernels.grouped_matmul import tpu as grouped_tpu
from pallas_kernels.mla_attention import tpu as attention_tpu
from pallas_kernels.mla_attention.cases import Case as AttentionCase
from pallas_kernels.mla_decode import tpu as decode_tpu
from pallas_kernels.mla_decode.cases import Case as DecodeCase
from pallas_kernels.quantised import block_scaled, dequantise
from tests import oracle_experts
from tests.pallas_kernels import test_tpu_attention, test_tpu_decode, test_tpu_grouped_matmul
from tests.pallas_kernels.comparisons import compare_attention, compare_decode
from tests.pallas_kernels.tpu_simulator import without_races

COUNT = os.environ.get("DSJAX_RANDOM_CASES")
FIRST_SEED = int(os.environ.get("DSJAX_RANDOM_SEED", "0"))
SIMULATOR = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")


def cases(**counts: int) -> Any:
    """Parametrises a test by implementation and seed: so many of each, or as the user says."""
    params = []
    for implementation, count in counts.items():
        on_gpu = implementation == "hopper"
        marks: list[Any] = [pytest.mark.gpu] if on_gpu else []
        platform = "gpu" if on_gpu else "cpu" if implementation == "tpu" else jax.default_backend()
        marks.append(pytest.mark.skipif(jax.default_backend() != platform, reason=f"on {platform}"))
        seeds = range(FIRST_SEED, FIRST_SEED + (int(COUNT) if COUNT else count))
        params += [
            pytest.param(implementation, seed, marks=marks, id=f"{implementation}-{seed}")
            for seed in seeds
        ]
    return pytest.mark.parametrize(("implementation", "seed"), params)


@contextlib.contextmanager
def noted(**drawn: Any) -> Iterator[None]:
    """Adds what was drawn to an error."""
    try:
        yield
    except Exception as error:
        error.add_note(f"drawn: {drawn}")
        raise


@pytest.fixture
def simulated(monkeypatch):
    """Gives a function that lets a TPU's kernels run simulated, with tiles that a case has many of.

    The public function still checks, pads and differentiates.
    """

    def simulate(module: Any, **options: dict[str, Any]) -> None:
        for name, chosen in options.items():
            call = functools.partial(getattr(module, name), interpret=SIMULATOR, **chosen)
            monkeypatch.setattr(module, name, call)

    return simulate


def pick(rng: np.random.Generator, *choices: Any) -> Any:
    """Draws one of the choices, which keeps its type."""
    return choices[rng.integers(len(choices))]


def length_of(rng: np.random.Generator, most: int) -> int:
    """Draws a length: one, or about a border of tiles, or any."""
    near = 64 * int(rng.integers(1, most // 64)) + int(rng.integers(-1, 2))
    return pick(rng, 1, near, near, int(rng.integers(1, most)))


def draw_attention(seed: int, implementation: str) -> tuple[AttentionCase, Any, Any, Any]:
    """Returns a case, its inputs, masks and the output's cotangent."""
    rng = np.random.default_rng([1, seed])
    most = 1500 if implementation == "hopper" else 330
    queries, keys = length_of(rng, most), length_of(rng, most)
    case = AttentionCase(
        f"random {seed}",
        batch=pick(rng, 1, 2, 3),
        queries=queries,
        keys=pick(rng, queries, keys, keys),
        heads=pick(rng, 1, 2, 2, 3, 4),
        causal=pick(rng, True, True, True, False),
        # Never 1: gradients are held to the size of their terms, which a few keys may cancel.
        sharpness=pick(rng, 0.01, 1.5, 1.5, 30, 100, 300),
    )
    narrow = jnp.float16 if implementation == "hopper" else jnp.float32
    arrays, _, d_out = case.draw(seed, pick(rng, jnp.bfloat16, jnp.bfloat16, narrow))
    B, T, S = case.batch, case.queries, case.keys
    masks: list[Any] = [None, None, None]
    if rng.integers(2):  # Documents in order or not, of any number, some without keys.
        ids = rng.integers(-(2**31), 2**31 - 1, size=pick(rng, 1, 2, 6))
        masks[0], masks[1] = (rng.choice(ids, (B, n)) for n in (T, S))
        if rng.integers(3):
            masks[:2] = [np.sort(mask, axis=1) for mask in masks[:2]]
    if case.causal and rng.integers(2):
        masks[2] = pick(rng, np.full(B, S - T), rng.integers(-T - 2, S + 3, B))
    masks = [None if mask is None else jnp.asarray(mask, jnp.int32) for mask in masks]
    return case, arrays, masks, d_out


@cases(xla=4, tpu=3, hopper=20)
def test_mla_attention(implementation, seed, simulated):
    case, arrays, masks, d_out = draw_attention(seed, implementation)
    if implementation == "tpu" and seed % 2:  # else the tiles of the table
        simulated(
            attention_tpu,
            forward={"tile": test_tpu_attention.FORWARD},
            backward={
                "tile": test_tpu_attention.BACKWARD,
                "resident_tokens": 256 if seed % 4 == 1 else 16384,
            },
        )
    elif implementation == "tpu":
        simulated(attention_tpu, forward={}, backward={})

    def both(arrays, masks, d_out):
        attend = functools.partial(
            mla_attention.mla_attention_with_lse,
            scale=case.scale,
            causal=case.causal,
            q_segment_ids_BT=masks[0],
            kv_segment_ids_BS=masks[1],
            q_offset_B=masks[2],
            implementation=implementation,
        )
        out, pullback, lse = jax.vjp(attend, *arrays, has_aux=True)
        return out, lse, pullback(d_out)

    with noted(case=case, dtype=arrays[0].dtype, masks=masks):
        if implementation == "tpu":
            results = without_races(both(arrays, masks, d_out))
        else:
            results = jax.jit(both)(arrays, masks, d_out)
        # Of float32's 24 bits a score of a thousand leaves 14 after the point.
        exact = 1e-5 * max(1, case.sharpness / 10)
        tolerance = exact if arrays[0].dtype == jnp.float32 else 5e-3
        compare_attention(case, arrays, masks, d_out, results, tolerance)


def draw_decode(seed: int, implementation: str) -> tuple[DecodeCase, Any]:
    """Returns a case and the arguments of `mla_decode`."""
    rng = np.random.default_rng([2, seed])
    hopper, tpu = implementation == "hopper", implementation == "tpu"
    page_size = pick(rng, 64, 64, 128) if hopper else pick(rng, 32, 64, 128)
    if implementation == "xla":
        page_size = pick(rng, 1, 7, 16, 64, 64, 128)
    # Of pages few enough for a simulator; a table may hold all of a sequence, a part or nothing.
    columns = int(rng.integers(1, min(40, (8192 if hopper else 2560) // page_size) + 1))
    capacity = columns * page_size
    batch = int(rng.integers(1, 4)) if tpu else pick(rng, 1, 2, 9, 40)
    tokens = pick(rng, 1, 1, 2, 4)
    lengths = [
        pick(
            rng,
            0,
            int(rng.integers(-200, tokens + 2)),
            int(rng.integers(1, capacity + 1)),
            capacity + int(rng.integers(-1, tokens + 1)),
            capacity + int(rng.integers(1, 3 * page_size + 1)),
        )
        for _ in range(batch)
    ]
    case = DecodeCase(
        f"random {seed}",
        tuple(lengths),
        num_tokens=tokens,
        num_heads=pick(rng, 8, 16, 32, 128) if hopper else pick(rng, 1, 4, 5, 16),
        page_size=page_size,
        table_pages=columns,
        sharpness=pick(rng, 0.01, 2.0, 60.0, 200.0),
    )
    dtype = jnp.bfloat16 if hopper else pick(rng, jnp.bfloat16, jnp.float32)
    arguments = case.draw(
        seed,
        dtype,
        pages_dtype=pick(rng, dtype, dtype, jnp.int8, jnp.float8_e4m3fn),
        dims=(512, 64) if hopper else (128, 64),
        unused=pick(rng, 1, 100, np.nan),
    )
    q_latent, q_rope, pages, table, lengths_B = arguments
    if pages.scale is not None:
        turned = rng.choice([1, 1, 1, -1, 0], pages.scale.shape)
        scale = jnp.where(jnp.isnan(pages.scale), pages.scale, pages.scale * turned)
        pages = dataclasses.replace(pages, scale=scale)
    if rng.integers(10) == 0:
        table = table[:, :0]
    return case, (q_latent, q_rope, pages, table, lengths_B)


@cases(xla=5, tpu=4, hopper=20)
def test_mla_decode(implementation, seed, simulated):
    case, arguments = draw_decode(seed, implementation)
    if implementation == "tpu":
        simulated(decode_tpu, decode={"tile": test_tpu_decode.SMALL} if seed % 2 else {})
    decode = functools.partial(
        mla_decode.mla_decode, scale=case.scale, implementation=implementation
    )
    pages, table = arguments[2], arguments[3]
    with noted(case=case, dtype=arguments[0].dtype, pages=pages.latent.dtype, table=table.shape):
        if implementation == "tpu" and table.size:
            results = without_races(decode(*arguments))
        else:
            results = jax.jit(decode)(*arguments)
        exact = 1e-5 * max(1, case.sharpness / 10)
        tolerance = exact if arguments[0].dtype == jnp.float32 else 5e-3
        compare_decode(case, arguments, results, tolerance)


def draw_groups(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, int, int]:
    """Returns rows of each group, the first group held and how many; rows may belong to none."""
    groups = int(rng.integers(1, 9))
    share = rng.dirichlet(np.full(groups + 1, pick(rng, 0.1, 1.0)))[:groups]
    sizes = np.floor(pick(rng, 1, share.sum()) * share / max(share.sum(), 1e-9) * rows).astype(int)
    sizes[rng.random(groups) < pick(rng, 0, 0.3, 1)] = 0
    if rng.integers(4) == 0:
        sizes[:] = 0
        sizes[rng.integers(groups)] = rows
    offset = int(rng.integers(groups))
    return sizes, offset, int(rng.integers(1, groups - offset + 1))


@cases(xla=4, tpu=2, hopper=20)
def test_grouped_matmul(implementation, seed, simulated):
    """One product with its gradients, or of quantised weights, or turned; and SwiGLU's value."""
    rng = np.random.default_rng([3, seed])
    if implementation == "tpu":
        simulated(
            grouped_tpu,
            row_products={"tile": test_tpu_grouped_matmul.ROWS_TILE},
            weight_gradient={"tile": test_tpu_grouped_matmul.GRADIENT_TILE},
        )
    step = {"xla": pick(rng, 1, 8, 64), "tpu": 128, "hopper": 64}[implementation]
    width_in, width_out = (step * int(rng.integers(1, 256 // step + 1)) for _ in range(2))
    rows = length_of(rng, 2000 if implementation == "hopper" else 330)
    sizes, offset, held = draw_groups(rng, rows)
    dtype = jnp.bfloat16 if implementation == "hopper" else pick(rng, jnp.bfloat16, jnp.float32)
    size = pick(rng, 1e-3, 1, 1e4)
    kind = pick(rng, "gradients", "gradients", "quantised", "transposed", "swiglu")
    lhs, d_out = (
        jnp.asarray(rng.normal(size=(rows, width)) * size, dtype) for width in (width_in, width_out)
    )
    if rng.integers(2):  # Rows of no group held are not looked at.
        first, last = sizes[:offset].sum(), sizes[: offset + held].sum()
        outside = (np.arange(rows) < first) | (np.arange(rows) >= last)
        lhs, d_out = (jnp.where(outside[:, None], jnp.nan, array) for array in (lhs, d_out))
    shape = (held, width_in, width_out)
    rhs, up = (jnp.asarray(rng.normal(size=shape) * width_in**-0.5, dtype) for _ in range(2))
    product = functools.partial(grouped_matmul.grouped_matmul, implementation=implementation)
    tolerance = 1e-2 if dtype == jnp.bfloat16 else 2e-5
    lhs64, rhs64, up64, d_out64 = (np.asarray(x).astype(np.float64) for x in (lhs, rhs, up, d_out))

    def close(got, want):
        got = np.asarray(got).astype(np.float64)
        assert got.shape == want.shape
        assert np.isfinite(got).all()
        assert np.abs(got - want).max(initial=0) <= tolerance * np.abs(want).max(initial=0)

    drawn = {"rows": rows, "sizes": sizes, "offset": offset, "held": held}
    drawn |= {"widths": (width_in, width_out), "dtype": dtype, "size": size, "kind": kind}
    groups = jnp.asarray(sizes, jnp.int32), jnp.int32(offset)
    with noted(**drawn):
        if kind == "quantised":
            weights = block_scaled(rhs, pick(rng, jnp.int8, jnp.float8_e4m3fn))
            got = product(lhs, weights, groups[0], group_offset=groups[1])
            values = np.asarray(dequantise(weights.values, weights.scales, jnp.float32))
            close(got, oracle_experts.grouped_matmul(lhs64, values, sizes, offset=offset))
        elif kind == "transposed":
            got = product(lhs, rhs.mT, groups[0], group_offset=groups[1], transpose_rhs=True)
            close(got, oracle_experts.grouped_matmul(lhs64, rhs64, sizes, offset=offset))
        elif kind == "swiglu":
            got = grouped_matmul.grouped_swiglu(
                lhs, rhs, up, groups[0], group_offset=groups[1], implementation=implementation
            )
            with np.errstate(over="ignore"):
                close(got, oracle_experts.grouped_swiglu(lhs64, rhs64, up64, sizes, offset=offset))
        else:
            call = functools.partial(product, group_sizes_G=groups[0], group_offset=groups[1])
            got, pullback = jax.vjp(call, lhs, rhs)
            close(got, oracle_experts.grouped_matmul(lhs64, rhs64, sizes, offset=offset))
            want = oracle_experts.grouped_matmul_gradients(
                lhs64, rhs64, sizes, d_out64, offset=offset
            )
            for gradient, right in zip(pullback(d_out), want, strict=True):
                close(gradient, right)


@cases(xla=5, hopper=20)
def test_expert_permute(implementation, seed):
    """Tokens to rows, a factor of each expert, and back by gates, with the gradients of both."""
    rng = np.random.default_rng([4, seed])
    tokens, experts, top_k = (int(rng.integers(1, most)) for most in (90, 13, 7))
    width = int(rng.integers(1, 70)) if implementation == "xla" else 128 * int(rng.integers(1, 5))
    dtype = pick(rng, jnp.bfloat16, jnp.float32)
    indices = rng.integers(0, pick(rng, 1, experts) + 1, (tokens, top_k))
    indices[rng.random(indices.shape) < pick(rng, 0, 0.5, 1)] = experts
    room = max(1, int((indices < experts).sum()))
    max_rows = pick(rng, None, room, int(rng.integers(room, indices.size + 1)))
    x, probe = jnp.asarray(rng.normal(size=(2, tokens, width)), dtype)
    gates = jnp.asarray(rng.normal(size=indices.shape) * pick(rng, 0, 1, 1e4), jnp.float32)
    factor = 2.0 ** rng.integers(-3, 4, experts + 1)  # exact in any dtype

    def run(x_ND, gates_NK):
        order = sort_by_expert(jnp.asarray(indices, jnp.int32), experts, max_rows)
        rows = expert_permute.gather_rows(x_ND, order, implementation=implementation)
        sizes = jnp.append(order.group_sizes_E, rows.shape[0] - order.group_sizes_E.sum())
        scale_M = jnp.repeat(
            jnp.asarray(factor).at[-1].set(0), sizes, total_repeat_length=rows.shape[0]
        )
        rows = rows * scale_M[:, None].astype(dtype)
        return expert_permute.combine_rows(rows, gates_NK, order, implementation=implementation)

    drawn = {"tokens": tokens, "experts": experts, "top_k": top_k, "width": width}
    with noted(**drawn, dtype=dtype, max_rows=max_rows, indices=indices):
        out, pullback = jax.vjp(jax.jit(run), x, gates)
        wide, probe64, gates64 = (np.asarray(y).astype(np.float64) for y in (x, probe, gates))
        scale = np.where(indices < experts, factor[indices], 0)
        total = (gates64 * scale).sum(axis=1, keepdims=True)
        terms = np.abs(gates64 * scale).sum(axis=1, keepdims=True)
        d_gates = (wide * probe64).sum(axis=1, keepdims=True) * scale
        d_terms = np.abs(wide * probe64).sum(axis=1, keepdims=True) * scale
        tolerance = 1e-2 if dtype == jnp.bfloat16 else 1e-5
        for got, want, size in (
            (out, wide * total, np.abs(wide) * terms),
            (pullback(probe)[0], probe64 * total, np.abs(probe64) * terms),
            (pullback(probe)[1], d_gates, d_terms),
        ):
            assert (np.abs(np.asarray(got).astype(np.float64) - want) <= tolerance * size).all()
