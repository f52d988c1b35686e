"""Absorbed decode on Hopper: its plan, its lowering, its errors, and the chip itself."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.mla_decode import (
    LatentPages,
    mla_decode,
)
from pallas_kernels.mla_decode.cases import CASES, Case
from pallas_kernels.mla_decode.hopper_split import find_share, part_bound, part_of, plan_work
from tests.pallas_kernels.test_mla_decode import check

FLOAT8 = jnp.float8_e4m3fn


def walk(starts, firsts, lengths, capacity, num_parts):
    """Follows the plan as the Hopper kernels do; returns the number of units of each part."""
    num_units = [max(1, -(-min(max(n, 0), capacity) // 128)) for n in lengths]
    np.testing.assert_array_equal(starts, np.cumsum([0, *num_units]))
    total = jnp.asarray(starts[-1])
    bounds = np.asarray(part_bound(jnp.arange(num_parts + 1), total, num_parts))
    assert bounds[0] == 0
    assert bounds[-1] == total
    slots: list[list[int]] = [[] for _ in lengths]
    for part in range(num_parts):
        begin, end = bounds[part], bounds[part + 1]
        inside = [b for b in range(len(lengths)) if starts[b] < end and starts[b + 1] > begin]
        if begin < end:
            assert firsts[part] == inside[0]
            assert firsts[part + 1] + (starts[firsts[part + 1]] < end) == inside[-1] + 1
        for b in inside if begin < end else []:
            slots[b].append(part + b)
    first_parts = part_of(jnp.asarray(starts[:-1]), total, num_parts)
    last_parts = part_of(jnp.asarray(starts[1:] - 1), total, num_parts)
    for b in range(len(lengths)):
        assert slots[b] == list(range(first_parts[b] + b, last_parts[b] + b + 1))
    every_slot = [slot for each in slots for slot in each]
    assert len(set(every_slot)) == len(every_slot)
    assert max(every_slot) < num_parts + len(lengths)
    return np.diff(bounds)


@pytest.mark.parametrize("num_parts", [1, 7, 132])
@pytest.mark.parametrize(
    "lengths",
    [
        (1,),
        (0, 0),
        (131072,),
        (8192,) * 9,
        (1, 5000, 0, -7, 129, 128, 127),
        tuple(range(0, 9000, 83)),
    ],
    ids=len,
)
def test_hopper_plan_covers_every_unit_once(lengths, num_parts):
    plan = jax.jit(plan_work, static_argnums=(1, 2))
    starts, firsts = (np.asarray(x) for x in plan(jnp.asarray(lengths), 131072, num_parts))
    work = walk(starts, firsts, lengths, 131072, num_parts)
    assert max(work) <= -(-sum(work) // num_parts)

    # The kernel for few rows finds the same from the lengths, each of its blocks for itself.
    def find(part):
        return find_share(jnp.asarray(lengths), len(lengths), 131072, 128, part, num_parts)

    shares = jax.jit(jax.vmap(find))(jnp.arange(num_parts))
    np.testing.assert_array_equal(shares.total, starts[-1])
    np.testing.assert_array_equal(shares.end - shares.begin, work)
    for part in range(num_parts):
        begin, end, first, last, start = (int(x[part]) for x in shares[1:])
        if begin == end:
            assert first >= last
        else:
            assert first == firsts[part]
            assert start == starts[first] <= begin < starts[first + 1]
            assert starts[last - 1] < end <= starts[last]


def lower_for_cuda(batch, num_tokens, num_heads, columns, page_size, pages_dtype=jnp.bfloat16):
    def struct(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    num_pages = batch * columns
    rows = (batch, num_tokens, num_heads)
    decode = functools.partial(mla_decode, scale=0.07, implementation="hopper")
    traced = jax.jit(decode).trace(
        struct(*rows, 512),
        struct(*rows, 64),
        LatentPages(
            struct(num_pages, page_size, 512, dtype=pages_dtype),
            struct(num_pages, page_size, 64),
            None
            if pages_dtype == jnp.bfloat16
            else struct(num_pages, page_size, dtype=jnp.float32),
        ),
        struct(batch, columns, dtype=jnp.int32),
        struct(batch, dtype=jnp.int32),
    )
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.core  # what Mosaic takes changes with jax
@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "num_kernels"),
    [
        ((128, 1, 16, 128, 64), 1),  # Few rows: their pieces are merged in the kernel itself.
        ((2, 3, 32, 3, 128), 2),  # The last tile is not full.
        ((2, 1, 128, 3, 64), 2),  # Clusters of two blocks.
        ((2, 1, 32, 3, 64, jnp.int8), 1),
        ((2, 1, 16, 3, 64, FLOAT8), 1),
    ],
    ids=["few_rows", "last_tile_not_full", "clusters", "int8", "float8"],
)
def test_hopper_lowers_for_cuda(sizes, num_kernels):
    """Shared memory, tensor core shapes and dtypes are checked here."""
    assert lower_for_cuda(*sizes).count("stablehlo.custom_call @mosaic_gpu") == num_kernels


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (slice(2), lambda q: [x.astype(jnp.float32) for x in q], "dtype float32 must be bfloat16"),
        (
            2,
            lambda p: dataclasses.replace(p, rope=p.rope.astype(jnp.float32)),
            "rope dtype float32 must be",
        ),
        (
            2,
            lambda p: dataclasses.replace(p, latent=p.latent.astype(jnp.float16)),
            "pages dtype float16 must be",
        ),
        (
            2,
            lambda p: LatentPages(p.latent[:, :48], p.rope[:, :48]),
            "page size 48 must be",
        ),
        (
            slice(2),
            lambda q: [x[:, :, :3] for x in q],
            "query rows 1 x 3 = 3 must be",
        ),
    ],
)
def test_hopper_errors_name_the_argument(index, change, message):
    arguments: list[Any] = list(Case("bad", (20,)).draw(seed=17, dtype=jnp.bfloat16))
    arguments[index] = change(arguments[index])
    with pytest.raises(ValueError, match=message):
        mla_decode(*arguments, scale=1.0, implementation="hopper")


@pytest.mark.parametrize("dims", [(256, 64), (512, 32)])
def test_hopper_takes_the_models_dims_only(dims):
    arguments = Case("bad", (20,)).draw(seed=18, dtype=jnp.bfloat16, dims=dims)
    with pytest.raises(ValueError, match=r"kv rank 256 must be 512|rope dim 32 must be 64"):
        mla_decode(*arguments, scale=1.0, implementation="hopper")


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a Hopper GPU")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_hopper_on_the_gpu(case):
    check(case, case.draw(seed=19, dtype=jnp.bfloat16), "hopper", 5e-3)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a Hopper GPU")
@pytest.mark.parametrize("pages_dtype", [jnp.int8, FLOAT8], ids=["int8", "float8"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_hopper_on_the_gpu_with_quantized_pages(case, pages_dtype):
    arguments = case.draw(seed=20, dtype=jnp.bfloat16, pages_dtype=pages_dtype)
    check(case, arguments, "hopper", 5e-3)
