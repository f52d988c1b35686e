"""Products of rows rounded to float8 with stored float8 weights, against NumPy in float64."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped_matmul as grouped
from pallas_kernels import hopper_fp8, hopper_fp8_rows, hopper_row_ranges, hopper_schedule
from pallas_kernels.fp8_rows import quantised_blocks, rounded
from pallas_kernels.grouped_matmul import LayerOfStack, grouped_matmul, grouped_swiglu
from pallas_kernels.grouped_matmul.cases import FP8_CASES as GROUPED_CASES
from pallas_kernels.quantised_matmul import QuantisedWeights, quantise, quantised_matmul, supported
from pallas_kernels.quantised_matmul.cases import CASES, FORMATS, FP8_CASES
from tests.oracle_attention import relative_error
from tests.pallas_kernels.hopper_simulator import simulate
from tests.pallas_kernels.test_quantised_matmul import draw, lower_for_cuda, stands_for

FP8_FORMATS = ("fp8", "fp8_block128")
ON_HOPPER = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a Hopper GPU")


def rounded_by_hand(rows: Any) -> np.ndarray:
    """Rows as float8 keeps them, in float64: block by block, the scale found by trying."""
    rows = np.asarray(rows, np.float64)
    out = np.zeros_like(rows)
    for index in np.ndindex(rows.shape[:-1]):
        for first in range(0, rows.shape[-1], 128):
            block = rows[index][first : first + 128]
            scale = 2.0**-100
            while np.abs(block).max() > 448 * scale:
                scale *= 2
            kept = (block / scale).astype(jnp.dtype(jnp.float8_e4m3fn)).astype(np.float64) * scale
            out[index][first : first + 128] = kept
    return out


def products_by_group(
    lhs: Any, matrices: np.ndarray, sizes: Sequence[int], first: int
) -> np.ndarray:
    """Rounded rows times their group's matrix [N, K], those of the first groups and of none 0."""
    rows = rounded_by_hand(lhs)
    out = np.zeros((len(rows), matrices.shape[1]))
    for row, group in enumerate(np.repeat(np.arange(len(sizes)), sizes)):
        if first <= group < first + len(matrices):
            out[row] = matrices[group - first] @ rows[row]
    return out


def stored_float8(rng: np.random.Generator, name: str, *shape: int) -> QuantisedWeights:
    """Random weights of a form, of order K^-0.5."""
    return quantise(jnp.asarray(draw(rng, *shape) * shape[-1] ** -0.5), FORMATS[name])


@pytest.mark.core
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_rows_round_to_float8_at_powers_of_two(dtype, rng):
    magnitudes = np.exp2(rng.integers(-30, 30, (6, 300)).astype(np.float32) // 4)
    rows = jnp.asarray(draw(rng, 6, 300) * magnitudes, dtype)
    values, scales = quantised_blocks(rows)
    assert values.dtype == jnp.float8_e4m3fn
    assert (values.shape, scales.shape) == ((6, 3, 128), (6, 3))
    assert (np.frexp(np.asarray(scales))[0] == 0.5).all()
    assert not np.asarray(values, np.float32)[:, 2, 44:].any()
    kept = rounded(rows)
    assert kept.dtype == dtype
    np.testing.assert_array_equal(np.asarray(kept, np.float64), rounded_by_hand(rows))
    np.testing.assert_array_equal(rounded(kept), kept)


@pytest.mark.core
def test_the_ends_of_the_range_and_what_is_no_number():
    ends = [0.0, 1e-37, 448.0, 448.5, 3.3e38, np.nan, np.inf]
    stored, scales = quantised_blocks(jnp.repeat(jnp.asarray(ends, jnp.float32), 128)[None])
    values = np.asarray(stored, np.float64)[0, :, 0]
    np.testing.assert_array_equal(values[:4], [0, 0, 448, 224])
    assert 224 < values[4] <= 448
    np.testing.assert_array_equal(np.asarray(scales)[0, :4], [2.0**-100, 2.0**-100, 1, 2])
    assert np.isnan(values[5] * float(scales[0, 5]))
    assert np.isnan(scales[0, 6])


@pytest.mark.core
@pytest.mark.parametrize("name", FP8_FORMATS)
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_products_are_those_of_rounded_rows(name, implementation, rng):
    for case in CASES:
        stored = stored_float8(rng, name, case.width_out, case.width_in)
        for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 6e-3)):
            lhs = jnp.asarray(draw(rng, 2, case.rows, case.width_in), dtype)
            want = rounded_by_hand(lhs) @ stands_for(stored).T
            got = quantised_matmul(lhs, stored, products="fp8", implementation=implementation)
            assert got.dtype == dtype
            assert relative_error(got, want) < tolerance
            # And rounding is there to be seen.
            wide = quantised_matmul(lhs, stored, implementation=implementation)
            assert 0.01 < relative_error(wide, want) < 0.06


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked_annotations")
@pytest.mark.parametrize("name", FP8_FORMATS)
def test_hopper_kernel_in_the_simulator(name, rng, monkeypatch):
    """Its indices, masks, barriers and sums, of a layer of a stack, with a warpgroup a thread."""
    for module in (hopper_fp8, hopper_fp8_rows, hopper_row_ranges, hopper_schedule):
        simulate(module, monkeypatch, windows_end_beyond=True)
    tile = hopper_fp8.Tile(stages=3, band=2)
    for num_rows, width_in, width_out, sizes, first in (
        (300, 384, 320, (100, 0, 129, 60), 0),
        (400, 272, 192, (50, 70, 200, 30), 1),
    ):
        held = len(sizes) - first
        rhs = [stored_float8(rng, name, 2, held, width_out, width_in) for _ in range(2)]
        lhs = jnp.asarray(draw(rng, num_rows, width_in), jnp.bfloat16)
        layers = [stands_for(jax.tree.map(lambda leaf: leaf[1], weights)) for weights in rhs]
        gates, ups = (products_by_group(lhs, layer, sizes, first) for layer in layers)
        places = (1, jnp.asarray(sizes, jnp.int32), jnp.int32(first))
        for dtype, tolerance in ((jnp.bfloat16, 4e-3), (jnp.float32, 1e-5)):
            how: dict[str, Any] = {"out_dtype": dtype, "tile": tile, "num_ctas": 3}
            got = hopper_fp8.row_products(lhs, rhs[:1], *places, **how)
            assert got.dtype == dtype
            assert relative_error(got, gates) < tolerance
            hidden = hopper_fp8.row_products(lhs, rhs, *places, activation=True, **how)
            assert relative_error(hidden, gates / (1 + np.exp(-gates)) * ups) < tolerance


@pytest.mark.parametrize("name", FP8_FORMATS)
@pytest.mark.parametrize("case", [*FP8_CASES[:5], None], ids=str)
def test_hopper_lowers(name, case):
    """For CUDA: shapes, shared memory and layouts have been checked then."""
    rows, width_in, width_out = (
        (16384, 10944, 2048) if case is None else (case.rows, case.width_in, case.width_out)
    )
    stored = jax.eval_shape(lambda: quantise(jnp.zeros((width_out, width_in)), FORMATS[name]))
    lhs = jax.ShapeDtypeStruct((rows, width_in), jnp.bfloat16)
    for dtype in (jnp.bfloat16, jnp.float32):

        def run(lhs, stored, dtype=dtype):
            how: dict[str, Any] = {"products": "fp8", "implementation": "hopper"}
            return quantised_matmul(lhs, stored, out_dtype=dtype, **how)

        # Rows are rounded by a kernel where blocks of 128 columns are whole.
        num_kernels = 2 if width_in % 128 == 0 else 1
        assert lower_for_cuda(run, lhs, stored).count("mosaic_gpu_v2") == num_kernels
    # Few are rounded by XLA, and read the matrix as rows do that stay as they are.
    few = jax.ShapeDtypeStruct((64, width_in), jnp.bfloat16)
    assert lower_for_cuda(run, few, stored).count("mosaic_gpu_v2") == (width_in % 64 == 0)


def check_rounding(rng: np.random.Generator) -> None:
    """Holds Hopper's rounding to XLA's, bit by bit."""
    for num_rows, width in ((64, 128), (200, 384), (1, 256)):
        spread = np.exp2(rng.integers(-30, 30, (num_rows, 1))).astype(np.float32)
        rows = np.asarray(draw(rng, num_rows, width) * spread)
        rows[-1, :128] = 0
        place = 130 % width
        rows[0, place] = np.nan
        array = jnp.asarray(rows, jnp.bfloat16)
        values, scales = hopper_fp8_rows.round_rows(array, 256)
        wanted, wanted_scales = quantised_blocks(array)
        kept = np.asarray(values, np.float32) * np.asarray(scales)[:, :num_rows].T[..., None]
        by_xla = np.asarray(wanted, np.float32) * np.asarray(wanted_scales)[..., None]
        for found in (kept, by_xla):
            assert np.isnan(found[0, place // 128, place % 128])
            found[0, place // 128] = 0  # what else a block with NaN has, nobody says
        np.testing.assert_array_equal(kept, by_xla)


@pytest.mark.usefixtures("unchecked_annotations")
def test_hopper_rounds_rows_in_the_simulator(rng, monkeypatch):
    for module in (hopper_fp8_rows, hopper_row_ranges):
        simulate(module, monkeypatch, windows_end_beyond=True)
    check_rounding(rng)


@pytest.mark.gpu
@ON_HOPPER
def test_hopper_rounds_rows(rng):
    check_rounding(rng)


@pytest.mark.gpu
@ON_HOPPER
@pytest.mark.parametrize("name", FP8_FORMATS)
@pytest.mark.parametrize("case", FP8_CASES, ids=str)
def test_hopper_multiplies_rounded_rows(name, case, rng):
    stored = stored_float8(rng, name, case.width_out, case.width_in)
    spread = np.exp2(rng.integers(-6, 6, (case.rows, 1))).astype(np.float32)
    lhs = jnp.asarray(draw(rng, case.rows, case.width_in) * spread, jnp.bfloat16)
    want = rounded_by_hand(lhs) @ stands_for(stored).T
    for dtype, tolerance in ((jnp.bfloat16, 6e-3), (jnp.float32, 2e-3)):
        got = quantised_matmul(
            lhs, stored, out_dtype=dtype, products="fp8", implementation="hopper"
        )
        assert got.dtype == dtype
        # Each row by its own size: a wrong scale shows, however small the row.
        sizes = np.linalg.norm(want, axis=1, keepdims=True)
        assert relative_error(np.asarray(got, np.float64) / sizes, want / sizes) < tolerance


@pytest.mark.usefixtures("unchecked_annotations")
def test_what_is_not_multiplied_in_float8_is_named(rng):
    sizes: dict[str, Any] = {"width_in": 128, "width_out": 128, "dtype": jnp.bfloat16}
    fp8: dict[str, Any] = sizes | {"form": FORMATS["fp8"], "products": "fp8"}
    for implementation in ("reference", "xla", "hopper"):
        assert supported(implementation, **fp8) is None
        for name, reason in (
            ("int8", "products 'fp8': weights dtype int8 must be float8_e4m3fn"),
            ("fp8_row128", "blocks of 128 x 1 weights must be 128 x 128 or whole columns"),
        ):
            found = supported(implementation, **fp8 | {"form": FORMATS[name]})
            assert found is not None
            assert found.endswith(reason)
    for changed, reason in (
        ({"dtype": jnp.float32}, "dtype float32 must be bfloat16"),
        ({"width_in": 200}, "input width 200 must be a multiple of 16"),
        ({"width_out": 96}, "output width 96 must be a multiple of 64"),
        ({"chip": "gpu"}, "chip 'gpu' must be 'hopper'"),
    ):
        assert supported("hopper", **fp8 | changed) == reason
    with pytest.raises(ValueError, match="products: 'fp4' must be one of"):
        supported("xla", **fp8 | {"products": "fp4"})
    stored = stored_float8(rng, "fp8", 128, 128)
    with pytest.raises(ValueError, match="'hopper' does not take this: dtype float32 must be"):
        quantised_matmul(jnp.ones((2, 128)), stored, products="fp8", implementation="hopper")


# Few rows, of which each reads its own matrix; some; and so many that all is in float8 on Hopper.
COUNTS = ([3, 0, 5, 1, 4], [2, 0, 81, 1, 4], [60, 0, 9, 90, 7])


@pytest.mark.parametrize("name", FP8_FORMATS)
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_groups_multiply_rounded_rows(name, implementation, rng):
    stacks = [stored_float8(rng, name, 2, 5, 40, 202) for _ in range(2)]
    matrices = [stands_for(stack)[1] for stack in stacks]
    layer = jnp.int32(1)
    gate, up = (LayerOfStack(stack, layer) for stack in stacks)
    how: dict[str, Any] = {"products": "fp8", "implementation": implementation}
    for counts in COUNTS:
        lhs = jnp.asarray(draw(rng, sum(counts) + 3, 202))
        sizes = jnp.asarray(counts, jnp.int32)
        gates, ups = (products_by_group(lhs, matrix, counts, 0) for matrix in matrices)
        assert relative_error(grouped_matmul(lhs, gate, sizes, **how), gates) < 1e-5
        hidden = grouped_swiglu(lhs, gate, up, sizes, **how)
        assert relative_error(hidden, gates / (1 + np.exp(-gates)) * ups) < 1e-5
        held = jax.tree.map(lambda leaf: leaf[2:4], gate.take())
        got = grouped_matmul(lhs, held, sizes, group_offset=2, **how)
        assert relative_error(got, products_by_group(lhs, matrices[0][2:4], counts, 2)) < 1e-5


@pytest.mark.parametrize("name", FP8_FORMATS)
def test_hopper_lowers_groups_and_copies_no_stack(name):
    """V2-Lite's experts in prefill; decode, whose rows are rounded, has the kernel for few."""
    how: dict[str, Any] = {"products": "fp8", "implementation": "hopper"}

    def run(lhs, gate, up, down, layer, sizes):
        gate, up, down = (LayerOfStack(stack, layer) for stack in (gate, up, down))
        hidden = grouped_swiglu(lhs, gate, up, sizes, **how)
        return grouped_matmul(hidden, down, sizes, **how)

    wide, high = (
        jax.eval_shape(lambda s=shape: quantise(jnp.zeros((3, 64, *s)), FORMATS[name]))
        for shape in ((1408, 2048), (2048, 1408))
    )
    whole = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((64,), jnp.int32)
    for num_rows in (49152, 768):
        lhs = jax.ShapeDtypeStruct((num_rows, 2048), jnp.bfloat16)
        text = lower_for_cuda(run, lhs, wide, wide, high, *whole)
        # SwiGLU and down, and of many rows the rounding before each.
        assert text.count("mosaic_gpu_v2") == (4 if num_rows == 49152 else 2)
        copied = [line for line in text.splitlines() if "stablehlo.dynamic_slice" in line]
        # Of columns' scales one layer's are taken, a byte in some thousand.
        assert not any("f8E4M3FN" in line for line in copied)
        assert len(copied) == (3 if name == "fp8" and num_rows == 49152 else 0)


def test_hopper_lowers_inside_shard_map():
    """Experts sharded: each shard has its own offset, and rows that all shards hold."""
    mesh = jax.make_mesh((1,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    stored = jax.eval_shape(lambda: quantise(jnp.zeros((4, 128, 256)), FORMATS["fp8_block128"]))

    def run(lhs, gate, up, sizes):
        offset = jax.lax.axis_index("expert") * 4
        how: dict[str, Any] = {"group_offset": offset, "implementation": "hopper"}
        out = grouped_swiglu(lhs, gate, up, sizes, products="fp8", **how)
        return jax.lax.psum(out.astype(jnp.float32), "expert")

    own, whole = jax.P("expert"), jax.P()
    sharded = jax.shard_map(run, mesh=mesh, in_specs=(whole, own, own, whole), out_specs=whole)
    lhs = jax.ShapeDtypeStruct((512, 256), jnp.bfloat16)
    sizes = jax.ShapeDtypeStruct((4,), jnp.int32)
    assert lower_for_cuda(sharded, lhs, stored, stored, sizes).count("mosaic_gpu_v2") == 2


@pytest.mark.gpu
@ON_HOPPER
@pytest.mark.parametrize("name", FP8_FORMATS)
@pytest.mark.parametrize("case", GROUPED_CASES, ids=str)
def test_hopper_multiplies_rounded_rows_by_group(name, case, rng):
    shape = (3, case.held, case.width_out, case.width_in)
    stacks = [stored_float8(rng, name, *shape) for _ in range(2)]
    lhs = jnp.asarray(draw(rng, case.num_rows, case.width_in), jnp.bfloat16)
    sizes = jnp.asarray(case.group_sizes, jnp.int32)
    assert case.num_rows > 32 * case.held  # else it is the kernel for few rows
    wholes = [stands_for(stack) for stack in stacks]

    @jax.jit
    def both(lhs, stacks, layer, sizes):
        gate, up = (LayerOfStack(stack, layer) for stack in stacks)
        how: dict[str, Any] = {"products": "fp8", "implementation": "hopper"}
        how["group_offset"] = case.offset
        return grouped_matmul(lhs, gate, sizes, **how), grouped_swiglu(lhs, gate, up, sizes, **how)

    for layer in range(2):
        matrices = [whole[layer] for whole in wholes]
        first = case.offset or 0
        gates, ups = (products_by_group(lhs, m, case.group_sizes, first) for m in matrices)
        found = both(lhs, stacks, jnp.int32(layer), sizes)
        for got, want in zip(found, (gates, gates / (1 + np.exp(-gates)) * ups), strict=True):
            assert relative_error(got, want) < 6e-3
            assert not np.asarray(got, np.float64)[~want.any(axis=1)].any()


@pytest.mark.usefixtures("unchecked_annotations")
def test_groups_not_multiplied_in_float8_are_named(rng):
    sizes: dict[str, Any] = {"width_in": 128, "width_out": 128, "dtype": jnp.bfloat16}
    fp8: dict[str, Any] = sizes | {"form": FORMATS["fp8_block128"], "products": "fp8"}
    for implementation in ("reference", "xla", "hopper"):
        assert grouped.supported(implementation, **fp8) is None
    for implementation, changed, reason in (
        ("tpu", {}, "products 'fp8' must be 'widen'"),
        ("xla", {"form": None}, "products 'fp8' must be of weights that are stored in float8"),
        ("hopper", {"form": FORMATS["int8"]}, "products 'fp8': weights dtype int8 must be float8"),
        ("hopper", {"dtype": jnp.float32}, "dtype float32 must be bfloat16"),
        ("hopper", {"width_in": 96}, "input width 96 must be a multiple of 64"),
    ):
        found = grouped.supported(implementation, **fp8 | changed)
        assert found is not None
        assert found.startswith(reason)
    lhs, counts = jnp.ones((4, 128)), jnp.asarray([4], jnp.int32)
    plain, stored = jnp.ones((1, 128, 128)), stored_float8(rng, "fp8", 1, 128, 128)
    how: dict[str, Any] = {"products": "fp8", "implementation": "xla"}
    with pytest.raises(ValueError, match="'xla' does not take this: products 'fp8' must be of"):
        grouped_matmul(lhs, plain, counts, **how)
    with pytest.raises(ValueError, match="have no gradient"):
        jax.grad(lambda lhs: jnp.sum(grouped_matmul(lhs, stored, counts, **how)))(lhs)
