"""The TPU kernel for stored numbers of groups, simulated on the CPU where no accesses may race."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chips import TPU_CHIPS
from pallas_kernels.grouped_matmul import LayerOfStack, grouped_matmul, grouped_swiglu
from pallas_kernels.grouped_matmul import tpu_quantised as kernel
from pallas_kernels.grouped_matmul.limits import tpu_reads
from pallas_kernels.quantised import Format, QuantisedWeights, quantise
from tests.oracle_attention import relative_error
from tests.pallas_kernels.tpu_simulator import without_races

SIMULATOR = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
FORMATS = {
    "int8": Format("int8"),
    "fp8": Format("float8_e4m3fn"),
    "fp8_block128": Format("float8_e4m3fn", 128, 128, scale_dtype="float32"),
    "int4_g64": Format("int4", 64),
    "int4_g128": Format("int4", 128),
}
# Two blocks of rows, groups over their border and of several chunks; two tiles of columns, the
# last of them partial; two groups' weights ahead.
TILE = kernel.Tile(rows=48, chunk=16, columns=256, body_columns=128, buffers=2)
ROWS, WIDTH_IN, WIDTH_OUT = 85, 256, 384
# Rows of none at the end; groups of one row, of several chunks and of none; all rows of one.
SPREADS = ([5, 0, 20, 1, 0, 37, 3], [0, 0, 0, 80, 0, 0, 0], [0] * 7)
HELD, OFFSET, LAYER = 5, 1, 1


def draw(rng: np.random.Generator, *shape: int) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def products(lhs: jax.Array, weights: QuantisedWeights, counts: list[int]) -> np.ndarray:
    """Each row times the matrix of its group, by what is stored, in float64."""
    matrices = np.asarray(weights.dequantised(jnp.float32), np.float64)
    found = np.zeros((lhs.shape[0], matrices.shape[-2]))
    for row, number in enumerate(np.repeat(np.arange(len(counts)), counts)):
        if OFFSET <= number < OFFSET + HELD:
            found[row] = matrices[number - OFFSET] @ np.asarray(lhs[row], np.float64)
    return found


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def close(got: jax.Array, want: np.ndarray) -> None:
    assert got.dtype == jnp.bfloat16
    assert not np.asarray(got, np.float64)[~want.any(axis=1)].any()
    assert not want.any() or relative_error(got, want) < 5e-3


@pytest.mark.parametrize("name", ["int8", "fp8_block128", "int4_g64"])
def test_a_layer_of_a_stack(name, rng):
    """SwiGLU over uneven and empty groups, of which some are held; rows outside hold anything."""
    shape = (2, HELD, WIDTH_OUT, WIDTH_IN)
    gate, up = (quantise(draw(rng, *shape), FORMATS[name]) for _ in range(2))
    lhs = (draw(rng, ROWS, WIDTH_IN) * WIDTH_IN**-0.5).astype(jnp.bfloat16)
    options: dict[str, Any] = {"activation": True, "tile": TILE, "interpret": SIMULATOR}
    call = jax.jit(functools.partial(kernel.row_products, **options))
    for counts in SPREADS:
        end = sum(counts)
        groups = jnp.asarray(counts, jnp.int32), jnp.int32(OFFSET)
        rows = lhs.at[end:].set(jnp.nan)
        got = without_races(call(rows, (gate, up), jnp.int32(LAYER), *groups))
        gates, ups = (
            products(lhs, jax.tree.map(lambda leaf: leaf[LAYER], stack), counts)
            for stack in (gate, up)
        )
        close(got, silu(gates) * ups)


@pytest.mark.parametrize("name", ["int8", "int4_g64"])
def test_the_public_functions(name, rng):
    """With the table's tiles, from a layer's own weights and from a stack."""
    counts = [0, 3, 0, 30, 1, 2, 0]
    stack = quantise(draw(rng, 2, HELD, 128, 256), FORMATS[name])
    lhs = (draw(rng, 40, 256) / 16).astype(jnp.bfloat16)
    sizes, layer = jnp.asarray(counts, jnp.int32), jnp.int32(1)
    of_stack = LayerOfStack(stack, layer)
    taken: Any = of_stack.take()
    options: dict[str, Any] = {"group_offset": OFFSET, "implementation": "tpu"}
    want = products(lhs, taken, counts)
    with pltpu.force_tpu_interpret_mode(SIMULATOR):
        close(without_races(grouped_matmul(lhs, taken, sizes, **options)), want)
        hidden = grouped_swiglu(lhs, of_stack, of_stack, sizes, **options)
        close(without_races(hidden), silu(want) * want)


def test_what_it_reads():
    """Other forms and rows of float32 are left to XLA."""

    def reads(form: Format, dtype: Any = jnp.bfloat16) -> bool:
        stored = jax.eval_shape(lambda: quantise(jnp.zeros((2, 128, 256)), form))
        return tpu_reads([stored, stored], dtype)

    assert all(map(reads, FORMATS.values()))
    assert not reads(FORMATS["int8"], jnp.float32)
    assert not reads(Format("uint4", 64))
    assert not reads(Format("int4", 256))
    assert not reads(Format("float8_e4m3fn", 128, 64))


@pytest.mark.parametrize("chip", TPU_CHIPS.values(), ids=TPU_CHIPS)
@pytest.mark.parametrize("name", FORMATS)
def test_tiles_divide_and_fit(name, chip):
    for depth, columns in ((5120, 1536), (1536, 5120), (2048, 1408), (1408, 2048), (128, 256)):
        for num_rows in (16, 768, 98304):
            form = FORMATS[name]
            tile = kernel.choose_tile(num_rows, 160, (depth, columns), form, 2, chip)
            assert tile.rows % 16 == tile.chunk % 16 == 0
            assert tile.chunk <= tile.rows
            assert tile.columns % 128 == tile.body_columns % 128 == 0
            # Cores that share a kernel all have a column tile.
            assert columns < 128 * chip.cores or -(-columns // tile.columns) % chip.cores == 0
            bits = 4 if form.dtype == "int4" else 8
            assert 2 * tile.buffers * depth * tile.columns * bits // 8 < chip.vmem_limit
