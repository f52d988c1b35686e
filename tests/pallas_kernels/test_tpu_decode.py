"""Absorbed decode's TPU kernel: values simulated on the CPU, and compilation."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mla_decode import LatentPages, mla_decode, tiles, tpu
from pallas_kernels.mla_decode.cases import CASES, Case
from pallas_kernels.mla_decode.limits import TPU_MAX_TABLE
from tests import oracle_decode
from tests.conftest import require_module
from tests.oracle_attention import relative_error
from tests.pallas_kernels.comparisons import compare_decode
from tests.pallas_kernels.tpu_programs import compile_programs
from tests.pallas_kernels.tpu_simulator import without_races
from tests.tpu_compiler import TOPOLOGIES

# More blocks than buffers at lengths that a simulator can do.
SMALL = dataclasses.replace(
    tiles.TPU, block_tokens=128, chunk_tokens=64, buffers=3, min_split_blocks=2
)


def simulate(case, arguments, tile):
    """Returns (out, lse) from the simulator of a TPU."""
    interpret = pltpu.InterpretParams(detect_races=True)
    return without_races(tpu.decode(*arguments, scale=case.scale, tile=tile, interpret=interpret))


def check(case, arguments, tolerance, tile=tiles.TPU):
    compare_decode(case, arguments, simulate(case, arguments, tile), tolerance)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bfloat16(case):
    check(case, case.draw(seed=1, dtype=jnp.bfloat16), 5e-3, SMALL)


@pytest.mark.parametrize("case", [CASES[3], CASES[7]], ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn], ids=["int8", "float8"])
def test_quantized(case, dtype):
    """Against the oracle on the dequantised latents, so only the arithmetic is judged."""
    check(case, case.draw(seed=2, dtype=jnp.bfloat16, pages_dtype=dtype), 5e-3, SMALL)


@pytest.mark.parametrize("case", [CASES[3], CASES[12]], ids=lambda case: case.name)
def test_tiles_of_the_table(case):
    check(case, case.draw(seed=3), 1e-5)


def test_what_is_not_cached_may_be_nan():
    """Slots after the end of a sequence and pages that are not its own never reach the output."""
    case = Case("nan", (70, 0, 3), num_tokens=2)
    for dtype in (jnp.float32, jnp.float8_e4m3fn):
        clean, poisoned = (
            case.draw(seed=4, dims=(128, 64), pages_dtype=dtype, unused=by) for by in (1, np.nan)
        )
        compare_decode(case, clean, simulate(case, poisoned, tiles.TPU), 1e-5)


def test_rope_padded_to_the_lanes():
    """A pool whose rotary keys are stored as 128 lanes, as they lie in a TPU's memory anyway."""
    case = Case("padded", (100, 5))
    q_latent, q_rope, pages, table, lengths = case.draw(seed=5)
    rope = jnp.pad(pages.rope, ((0, 0), (0, 0), (0, 64)))
    arguments = (q_latent, q_rope, dataclasses.replace(pages, rope=rope), table, lengths)
    out, _ = simulate(case, arguments, tiles.TPU)
    want, _ = oracle_decode.decode(q_latent, q_rope, pages, table, lengths, scale=case.scale)
    assert relative_error(out, want) < 1e-5


@pytest.mark.parametrize(
    ("case", "dtype", "message"),
    [
        (Case("e", (5,), page_size=16), jnp.float32, "page size 16 must be a multiple of 32"),
        (
            Case("e", (5,), num_heads=128, num_tokens=5),
            jnp.float32,
            "query rows 5 x 128 = 640 must be at most 512",
        ),
        (Case("e", (5,)), jnp.float16, "dtype float16 must be bfloat16 or float32"),
    ],
)
def test_errors_name_the_argument(case, dtype, message):
    arguments = case.draw(seed=6, dtype=dtype)
    with pytest.raises(ValueError, match=message):
        mla_decode(*arguments, scale=1.0, implementation="tpu")


def test_error_of_a_large_page_table():
    arguments: list[Any] = list(Case("e", (5,)).draw(seed=7))
    arguments[3] = jnp.zeros((1, TPU_MAX_TABLE + 1), jnp.int32)
    with pytest.raises(ValueError, match="page table columns 131073 must be at most 131072"):
        mla_decode(*arguments, scale=1.0, implementation="tpu")


def test_table_larger_than_scalar_memory():
    """Three sequences of five pages where there is room for eleven entries: two calls."""
    case = Case("divided", (300, 70, 5), table_pages=5)
    arguments = case.draw(seed=8)
    interpret = pltpu.InterpretParams(detect_races=True)
    decode = functools.partial(
        tpu.decode, scale=case.scale, tile=SMALL, max_table=11, interpret=interpret
    )
    assert str(jax.make_jaxpr(decode)(*arguments)).count("pallas_call[") == 2
    compare_decode(case, arguments, without_races(decode(*arguments)), 1e-5)


def test_takes_the_table_of_many_long_sequences():
    """128 sequences of 163,840 tokens: 327,680 entries, which once were refused."""
    B, P, heads = 128, 2560, 16
    pages = LatentPages(*(jax.ShapeDtypeStruct((P, 64, n), jnp.bfloat16) for n in (512, 128)))
    queries = [jax.ShapeDtypeStruct((B, 1, heads, n), jnp.bfloat16) for n in (512, 64)]
    table, lengths = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((B, P), (B,)))
    decode = functools.partial(mla_decode, scale=0.1, implementation="tpu")
    out, _ = jax.eval_shape(decode, *queries, pages, table, lengths)
    assert out.shape == (B, 1, heads, 512)


@pytest.mark.slow
@pytest.mark.tpu_program
def test_compiles_for_every_chip():
    require_module("libtpu")
    results = compile_programs("decode", ",".join(TOPOLOGIES))
    assert {result["chip"] for result in results} == set(TOPOLOGIES)
    assert len(results) == 5 * len(TOPOLOGIES)
    for result in results:
        assert result["kernels"] == ["mla_decode"], result
        # XLA copies a pool of rotary keys of 64 lanes before the kernel, but not one of 128. When
        # it no longer does the first, `allocate_pool` need not pad.
        copied = [shape for shape in result["copied"] if shape.startswith("4096,64,")]
        if result["program"] == "v2_lite_whole_lanes":
            assert copied == [], result
        if result["program"] == "v2_lite":
            assert copied == ["4096,64,64"], result
