"""Grouped matmul's TPU kernels: values and gradients simulated on the CPU, and compilation.

A simulated kernel takes two seconds to compile and tenths of one to run. So the cases are brought
to a few shapes, with more rows and with empty groups at the end, and each shape's program is kept.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chips import ANY_TPU, TPU_CHIPS, tpu_chip
from pallas_kernels.grouped_matmul import (
    BlockScaledWeights,
    LayerOfStack,
    block_scaled,
    dequantise,
    grouped_matmul,
    grouped_swiglu,
    tiles,
    tpu,
)
from pallas_kernels.grouped_matmul.cases import CASES, Case, make_inputs
from pallas_kernels.grouped_matmul.tpu_windows import FIRST, LAST, make_windows
from tests import oracle_experts as oracle
from tests.conftest import require_module
from tests.pallas_kernels.tpu_grouped_programs import compile_programs
from tests.pallas_kernels.tpu_simulator import without_races
from tests.tpu_compiler import TOPOLOGIES

TOLERANCE = {jnp.float32: 2e-5, jnp.bfloat16: 1e-2}
SIMULATOR = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
ROWS_TILE = tiles.TpuRowsTile(
    rows=64, large=32, small=16, columns=256, body_columns=128, weight_buffers=2
)
GRADIENT_TILE = tiles.TpuWeightGradientTile(
    rows=64, depths=(32, 64), height=128, width=128, body_height=128
)


def simulated(case):
    """A case as it is simulated: its groups in one of few shapes, with the tiles' edges in it."""
    sizes = case.group_sizes
    if case.name == "larger_than_tiles":
        sizes = (257, 129, 66)  # Several windows and some more, as in the case itself.
    held = 8 if case.offset is None else 4
    few = case.num_rows < 16
    return dataclasses.replace(
        case,
        num_rows=case.num_rows if few else 500,
        width_in=256 if few else 128,
        width_out=256,
        group_sizes=(*sizes, *[0] * (8 - len(sizes))),
        offset=None if case.offset is None else min(case.offset, 8 - held),
        num_held=held,
    )


SIMULATED = tuple(map(simulated, CASES))
# What a kernel's corners need: a case of each, not all of them.
MIXED = Case("mixed", 150, 128, 384, (20, 0, 1, 75, 9, 0, 33), offset=1, num_held=5)
# The windows are those of the product that is not transposed, so a few of the cases do.
TRANSPOSED = (*(SIMULATED[n] for n in (0, 1, 9)), MIXED)


@functools.cache
def program(kernel, **options):
    """A kernel on a simulated TPU, compiled once for its options and shape of arguments."""
    return jax.jit(functools.partial(kernel, **options, interpret=SIMULATOR))


def products(lhs, rhs, *groups, tile=ROWS_TILE, **options):
    """The products of rows on a simulated TPU, where no two accesses may race."""
    return without_races(program(tpu.row_products, tile=tile, **options)((lhs,), rhs, *groups))


def matmul(lhs, rhs, *groups, **options):
    """As `products`, of one matrix a group."""
    return products(lhs, (rhs,), *groups, **options)[0]


def weight_gradient(*arrays, tile=GRADIENT_TILE, num_groups):
    """The gradient of the weights on a simulated TPU, where no two accesses may race."""
    return without_races(program(tpu.weight_gradient, tile=tile, num_groups=num_groups)(*arrays))


def close(got, want, dtype=jnp.bfloat16):
    """Largest error relative to the largest value."""
    assert got.dtype == dtype
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    assert np.isfinite(got).all()
    assert np.abs(got - want).max() <= TOLERANCE[dtype] * max(1.0, np.abs(want).max())


def draw(case, dtype, seed=0):
    """Arrays of a case, in the kernel's type and as the oracle takes them."""
    inputs = make_inputs(case, seed)
    arrays = [x.astype(dtype) for x in (inputs.lhs, inputs.rhs, inputs.second_rhs, inputs.d_out)]
    return arrays, [np.asarray(x, np.float64) for x in arrays], inputs.group_sizes


def check(case, dtype, rows_tile=ROWS_TILE, gradient_tile=GRADIENT_TILE):
    (lhs, rhs, _, d_out), (lhs64, rhs64, _, d_out64), sizes = draw(case, dtype)
    offset = case.offset or 0
    groups = (sizes, jnp.int32(offset))
    out = matmul(lhs, rhs, *groups, tile=rows_tile)
    close(out, oracle.grouped_matmul(lhs64, rhs64, sizes, offset=offset), dtype)
    d_lhs, d_rhs = oracle.grouped_matmul_gradients(lhs64, rhs64, sizes, d_out64, offset=offset)
    if case in TRANSPOSED:
        close(matmul(d_out, rhs, *groups, tile=rows_tile, transpose_rhs=True), d_lhs, dtype)
    got = weight_gradient(lhs, d_out, *groups, tile=gradient_tile, num_groups=case.held)
    close(got, d_rhs, dtype)
    empty = np.asarray(sizes)[offset : offset + case.held] == 0
    assert not np.asarray(got)[empty].any()


@pytest.mark.parametrize("case", SIMULATED, ids=str)
def test_bfloat16(case):
    check(case, jnp.bfloat16)


def test_float32():
    check(MIXED, jnp.float32)


def test_tiles_of_the_table():
    """The sizes that are used on a chip, for groups of a window and more."""
    case = Case("long", 900, 128, 256, (513, 0, 300, 70))
    check(case, jnp.bfloat16, rows_tile=None, gradient_tile=None)


def test_rows_outside_the_groups_may_hold_anything():
    arrays, (lhs64, rhs64, _, d_out64), sizes = draw(simulated(MIXED), jnp.bfloat16)
    outside = np.r_[0:20, 105:500]
    lhs, d_out = arrays[0].at[outside].set(jnp.nan), arrays[3].at[outside].set(jnp.inf)
    groups = (sizes, jnp.int32(1))
    out = matmul(lhs, arrays[1], *groups)
    close(out, oracle.grouped_matmul(lhs64, rhs64, sizes, offset=1))
    _, d_rhs = oracle.grouped_matmul_gradients(lhs64, rhs64, sizes, d_out64, offset=1)
    close(weight_gradient(lhs, d_out, *groups, num_groups=4), d_rhs)


def test_swiglu():
    (lhs, gate, up, _), (lhs64, gate64, up64, _), sizes = draw(MIXED, jnp.bfloat16, seed=1)
    (hidden,) = products(lhs, (gate, up), sizes, jnp.int32(1), activation=True)
    close(hidden, oracle.grouped_swiglu(lhs64, gate64, up64, sizes, offset=1))


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn], ids=["int8", "float8"])
def test_quantised_weights(dtype):
    """Against the oracle on the dequantised weights, so only the arithmetic is judged."""
    case = dataclasses.replace(MIXED, width_in=256)
    (lhs, gate, up, _), (lhs64, *_), sizes = draw(case, jnp.bfloat16)
    groups = (sizes, jnp.int32(1))
    gate, up = (block_scaled(x, dtype) for x in (gate, up))
    gate64, up64 = (dequantise(x.values, x.scales, jnp.float32) for x in (gate, up))
    want = oracle.grouped_swiglu(lhs64, gate64, up64, sizes, offset=1)
    close(products(lhs, (gate, up), *groups, activation=True)[0], want)
    turned = BlockScaledWeights(up.values.mT, up.scales.mT)
    out = matmul(lhs, turned, *groups, transpose_rhs=True)
    close(out, oracle.grouped_matmul(lhs64, up64, sizes, offset=1))


def test_one_layer_of_a_stack():
    """The weights of several layers, of which one layer's groups are used where they lie."""
    case = Case("stack", 100, 128, 128, (30, 0, 50, 20))
    layers = [draw(case, jnp.bfloat16, seed) for seed in range(3)]
    stack = jnp.stack([arrays[1] for arrays, *_ in layers])
    arrays, wide, sizes = layers[2]
    weights = LayerOfStack(stack, jnp.int32(2))
    out = matmul(arrays[0], weights, sizes, jnp.int32(0))
    close(out, oracle.grouped_matmul(wide[0], wide[1], sizes))


def test_the_public_functions_and_their_gradients():
    """So also the kernels that keep both products and that sum two rows' gradients."""
    (lhs, gate, up, d_out), wide, sizes = draw(MIXED, jnp.bfloat16, seed=2)
    lhs64, gate64, up64, d_out64 = wide

    def call(lhs, gate, up):
        options: dict[str, Any] = {"group_offset": 1, "implementation": "tpu"}
        return grouped_swiglu(lhs, gate, up, sizes, **options)

    with pltpu.force_tpu_interpret_mode(SIMULATOR):
        hidden, pull = jax.vjp(call, lhs, gate, up)
        gradients = without_races(pull(d_out))
    close(hidden, oracle.grouped_swiglu(lhs64, gate64, up64, sizes, offset=1))
    wants = oracle.grouped_swiglu_gradients(lhs64, gate64, up64, sizes, d_out64, offset=1)
    for got, want in zip(gradients, wants, strict=True):
        close(got, want)


def test_windows_cover_each_range_once():
    start = jnp.array([3, 20, 20, 150, 151])
    windows = make_windows(start, 64, 151, empty_ranges=True)
    (count,), ranges, bases, lows, highs, bits = map(np.asarray, windows.scalars)
    covered: list[list[int]] = [[], [], [], []]
    for n in range(count):
        assert bases[n] % 16 == 0
        assert highs[n] <= 64
        covered[ranges[n]] += range(bases[n] + lows[n], bases[n] + highs[n])
    assert covered == [list(range(3, 20)), [], list(range(20, 150)), [150]]
    assert (np.flatnonzero(bits[:count] & FIRST) == [0, 1, 2, 5]).all()
    assert (np.flatnonzero(bits[:count] & LAST) == [0, 1, 4, 5]).all()
    assert make_windows(start, 64, 151, empty_ranges=False).count == count - 1


@pytest.mark.parametrize("chip", TPU_CHIPS.values(), ids=TPU_CHIPS)
def test_tiles_divide_and_fit(chip):
    for depth, columns in ((5120, 1536), (1536, 5120), (2048, 1408), (1408, 2048), (128, 256)):
        for num_rows in (48, 98304):
            tile = tiles.tpu_rows_tile(
                num_rows,
                160,
                (depth, columns),
                transpose_rhs=False,
                arrays=(1, 2, 3),
                itemsizes=(2, 2),
                chip=chip,
            )
            assert tile.rows % tile.large == tile.large % tile.small == tile.small % 16 == 0
            assert tile.columns % 128 == tile.body_columns % 128 == 0
            # Cores that share a kernel all have a column tile.
            assert -(-columns // tile.columns) % chip.cores == 0
            assert 2 * tile.weight_buffers * depth * tile.columns * 2 < chip.vmem_limit
            gradient = tiles.tpu_weight_gradient_tile(num_rows, 160, (depth, columns), 2, chip=chip)
            assert depth % gradient.height == columns % gradient.width == 0
            assert gradient.height % gradient.body_height == 0
            assert gradient.depths[-1] == gradient.rows
            assert 6 * gradient.height * gradient.width < chip.vmem_limit


def test_the_mesh_in_use_names_the_chip():
    """So a host without a TPU compiles with the tiles of the chip that it compiles for."""
    device = jax.sharding.AbstractDevice("TPU v6 lite", 1, "tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert tpu_chip() == TPU_CHIPS["v6e"]
    assert tpu_chip() == ANY_TPU


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ((96, 128), "input width 96 must be a multiple of 128"),
        ((128, 192), "output width 192 must be a multiple of 128"),
    ],
)
def test_refuses_widths(widths, message):
    lhs, rhs = jnp.ones((8, widths[0])), jnp.ones((2, *widths))
    with pytest.raises(ValueError, match=message):
        grouped_matmul(lhs, rhs, jnp.array([4, 4]), implementation="tpu")


@pytest.mark.slow
@pytest.mark.tpu_program
def test_compiles_for_every_chip():
    """With libtpu's compiler: forward and backward, V2's and V2-Lite's sizes."""
    require_module("libtpu")
    results = compile_programs(tuple(TOPOLOGIES))
    assert {result["chip"] for result in results} == set(TOPOLOGIES)
    for result in results:
        want = {"grouped_swiglu", "grouped_matmul"}
        if result["program"].endswith("training"):
            want |= {"grouped_weight_gradient"}
        assert set(result["kernels"]) == want, result
        # The activations that are kept and their gradients, but no copy of any weights.
        assert result["temporary"] < result["rows_bytes"], result
