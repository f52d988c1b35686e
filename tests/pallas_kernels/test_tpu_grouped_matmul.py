"""Grouped matmul's TPU kernels: values and gradients simulated on the CPU, and compilation.

A simulated kernel takes two seconds to compile and tenths of one to run. So the cases are brought
to a few shapes, with more rows and empty groups behind, and each shape's program is kept.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

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
from pallas_kernels.grouped_matmul.tpu_windows import FIRST, LAST, make_windows
from tests import oracle_experts as oracle
from tests.conftest import require_module
from tests.pallas_kernels.grouped_matmul_cases import CASES, Case, make_inputs
from tests.pallas_kernels.tpu_grouped_programs import compile_programs
from tests.pallas_kernels.tpu_programs import TOPOLOGIES
from tests.pallas_kernels.tpu_simulator import without_races

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


def small_rows_tile(*_, **__):
    return ROWS_TILE


def small_gradient_tile(*_):
    return GRADIENT_TILE


@pytest.fixture
def small_tiles(monkeypatch):
    """Several windows of a group and several tiles, at sizes that a simulator can do."""
    monkeypatch.setattr(tiles, "tpu_rows_tile", small_rows_tile)
    monkeypatch.setattr(tiles, "tpu_weight_gradient_tile", small_gradient_tile)


@functools.cache
def program(kernel, rows_tile, **options):
    """A kernel on a simulated TPU, compiled once for a choice of tiles and shape of arguments."""
    del rows_tile  # Looked up when it is traced.
    return jax.jit(functools.partial(kernel, **options, interpret=SIMULATOR))


def simulate(kernel, *arrays, **options):
    """The result of a kernel on a simulated TPU, where no two accesses may race."""
    return without_races(program(kernel, tiles.tpu_rows_tile, **options)(*arrays))


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


def check(case, dtype):
    (lhs, rhs, _, d_out), (lhs64, rhs64, _, d_out64), sizes = draw(case, dtype)
    offset = case.offset or 0
    groups = (sizes, jnp.int32(offset))
    out = simulate(tpu.matmul, lhs, rhs, *groups, transpose_rhs=False)
    close(out, oracle.grouped_matmul(lhs64, rhs64, sizes, offset=offset), dtype)
    d_lhs, d_rhs = oracle.grouped_matmul_gradients(lhs64, rhs64, sizes, d_out64, offset=offset)
    if case in TRANSPOSED:
        close(simulate(tpu.matmul, d_out, rhs, *groups, transpose_rhs=True), d_lhs, dtype)
    got = simulate(tpu.weight_gradient, lhs, d_out, *groups, num_groups=case.held)
    close(got, d_rhs, dtype)
    empty = np.asarray(sizes)[offset : offset + case.held] == 0
    assert not np.asarray(got)[empty].any()


@pytest.mark.parametrize("case", SIMULATED, ids=str)
@pytest.mark.usefixtures("small_tiles")
def test_bfloat16(case):
    check(case, jnp.bfloat16)


@pytest.mark.usefixtures("small_tiles")
def test_float32():
    check(MIXED, jnp.float32)


def test_tiles_of_the_table():
    """The sizes that are used on a chip, for groups of a window and more."""
    check(Case("long", 900, 128, 256, (513, 0, 300, 70)), jnp.bfloat16)


@pytest.mark.usefixtures("small_tiles")
def test_rows_outside_the_groups_may_hold_anything():
    arrays, (lhs64, rhs64, _, d_out64), sizes = draw(simulated(MIXED), jnp.bfloat16)
    outside = np.r_[0:20, 105:500]
    lhs, d_out = arrays[0].at[outside].set(jnp.nan), arrays[3].at[outside].set(jnp.inf)
    groups = (sizes, jnp.int32(1))
    out = simulate(tpu.matmul, lhs, arrays[1], *groups, transpose_rhs=False)
    close(out, oracle.grouped_matmul(lhs64, rhs64, sizes, offset=1))
    _, d_rhs = oracle.grouped_matmul_gradients(lhs64, rhs64, sizes, d_out64, offset=1)
    close(simulate(tpu.weight_gradient, lhs, d_out, *groups, num_groups=4), d_rhs)


@pytest.mark.usefixtures("small_tiles")
def test_swiglu():
    (lhs, gate, up, _), wide, sizes = draw(MIXED, jnp.bfloat16, seed=1)
    hidden = simulate(tpu.swiglu, lhs, gate, up, sizes, jnp.int32(1))
    close(hidden, oracle.grouped_swiglu(*wide[:3], sizes, offset=1))


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn], ids=["int8", "float8"])
@pytest.mark.usefixtures("small_tiles")
def test_quantised_weights(dtype):
    """Against the oracle on the dequantised weights, so only the arithmetic is judged."""
    case = dataclasses.replace(MIXED, width_in=256)
    (lhs, gate, up, _), (lhs64, *_), sizes = draw(case, jnp.bfloat16)
    groups = (sizes, jnp.int32(1))
    gate, up = (block_scaled(x, dtype) for x in (gate, up))
    gate64, up64 = (dequantise(x.values, x.scales, jnp.float32) for x in (gate, up))
    want = oracle.grouped_swiglu(lhs64, gate64, up64, sizes, offset=1)
    close(simulate(tpu.swiglu, lhs, gate, up, *groups), want)
    turned = BlockScaledWeights(up.values.mT, up.scales.mT)
    out = simulate(tpu.matmul, lhs, turned, *groups, transpose_rhs=True)
    close(out, oracle.grouped_matmul(lhs64, up64, sizes, offset=1))


@pytest.mark.usefixtures("small_tiles")
def test_one_layer_of_a_stack():
    """The weights of several layers, of which one layer's groups are used where they lie."""
    case = Case("stack", 100, 128, 128, (30, 0, 50, 20))
    layers = [draw(case, jnp.bfloat16, seed) for seed in range(3)]
    stack = jnp.stack([arrays[1] for arrays, *_ in layers])
    arrays, wide, sizes = layers[2]
    weights = LayerOfStack(stack, jnp.int32(2))
    out = simulate(tpu.matmul, arrays[0], weights, sizes, jnp.int32(0), transpose_rhs=False)
    close(out, oracle.grouped_matmul(wide[0], wide[1], sizes))


@pytest.mark.usefixtures("small_tiles")
def test_the_public_functions_and_their_gradients():
    """So also the kernels that keep both products and that sum two rows' gradients."""
    (lhs, gate, up, d_out), wide, sizes = draw(MIXED, jnp.bfloat16, seed=2)

    def call(lhs, gate, up):
        options = {"group_offset": 1, "implementation": "tpu"}
        return grouped_swiglu(lhs, gate, up, sizes, **options)

    with pltpu.force_tpu_interpret_mode(SIMULATOR):
        hidden, pull = jax.vjp(call, lhs, gate, up)
        gradients = without_races(pull(d_out))
    close(hidden, oracle.grouped_swiglu(*wide[:3], sizes, offset=1))
    wants = oracle.grouped_swiglu_gradients(*wide[:3], sizes, wide[3], offset=1)
    for got, want in zip(gradients, wants, strict=True):
        close(got, want)


def test_windows_cover_each_range_once():
    start = jnp.array([3, 20, 20, 150, 151])
    windows = make_windows(start, 64, 151, empty_ranges=True)
    (count,), ranges, bases, lows, highs, bits = map(np.asarray, windows.scalars)
    covered = [[], [], [], []]
    for n in range(count):
        assert bases[n] % 16 == 0
        assert highs[n] <= 64
        covered[ranges[n]] += range(bases[n] + lows[n], bases[n] + highs[n])
    assert covered == [list(range(3, 20)), [], list(range(20, 150)), [150]]
    assert (np.flatnonzero(bits[:count] & FIRST) == [0, 1, 2, 5]).all()
    assert (np.flatnonzero(bits[:count] & LAST) == [0, 1, 4, 5]).all()
    assert make_windows(start, 64, 151, empty_ranges=False).count == count - 1


@pytest.mark.parametrize(
    ("kind", "cores"), [("TPU v5 lite", 1), ("TPU v5", 2), ("TPU v6 lite", 1), ("TPU7x", 1)]
)
def test_tiles_divide_and_fit(monkeypatch, kind, cores):
    monkeypatch.setattr(tiles, "tpu_chip", lambda: tiles._TPU_CHIPS[kind])
    for depth, columns in ((5120, 1536), (1536, 5120), (2048, 1408), (1408, 2048), (128, 256)):
        for num_rows in (48, 98304):
            tile = tiles.tpu_rows_tile(
                num_rows,
                160,
                (depth, columns),
                transpose_rhs=False,
                arrays=(1, 2, 3),
                itemsizes=(2, 2),
            )
            assert tile.rows % tile.large == tile.large % tile.small == tile.small % 16 == 0
            assert tile.columns % 128 == tile.body_columns % 128 == 0
            # Cores that share a kernel all have a column tile.
            assert -(-columns // tile.columns) % cores == 0
            assert 2 * tile.weight_buffers * depth * tile.columns * 2 < tiles.tpu_vmem_limit()
            gradient = tiles.tpu_weight_gradient_tile(num_rows, 160, (depth, columns), 2)
            assert depth % gradient.height == columns % gradient.width == 0
            assert gradient.height % gradient.body_height == 0
            assert gradient.depths[-1] == gradient.rows
            assert 6 * gradient.height * gradient.width < tiles.tpu_vmem_limit()


def test_the_mesh_in_use_names_the_chip():
    """So a host without a TPU compiles with the tiles of the chip that it compiles for."""
    device = jax.sharding.AbstractDevice("TPU v6 lite", 1, "tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert tiles.tpu_vmem_limit() == 124 * 2**20
    assert tiles.tpu_vmem_limit() == 60 * 2**20


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ((96, 128), r"lhs_MK: widths \(96,\) must be multiples of 128"),
        ((128, 192), r"rhs_GKN: widths \(128, 192\) must be multiples of 128"),
    ],
)
def test_refuses_widths(widths, message):
    lhs, rhs = jnp.ones((8, widths[0])), jnp.ones((2, *widths))
    with pytest.raises(ValueError, match=message):
        grouped_matmul(lhs, rhs, jnp.array([4, 4]), implementation="tpu")


@pytest.mark.slow
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
