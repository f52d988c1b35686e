"""Products with quantised matrices, dense and by group, against NumPy in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.xla_options import inference_options
from pallas_kernels.grouped_matmul import LayerOfStack, grouped_matmul, grouped_swiglu
from pallas_kernels.quantised import hopper_refusal, pack_halves, unpack_halves
from pallas_kernels.quantised_matmul import (
    Format,
    QuantisedWeights,
    quantise,
    quantised_matmul,
    supported,
)
from pallas_kernels.quantised_matmul.cases import CASES, FORMATS
from tests.oracle_attention import relative_error


def stands_for(weights: QuantisedWeights) -> np.ndarray:
    """The matrices that are stored, in float64 [..., N, K]; written apart from the code."""
    form = weights.format
    values, scales = np.asarray(weights.values), np.asarray(weights.scales, np.float64)
    *lead, num_n, _ = values.shape
    num_k = values.shape[-1]
    out = np.zeros((*lead, num_n, num_k))
    block_in = form.block_in or num_k
    for k in range(num_k):
        numbers = values[..., k].astype(np.float64)
        if weights.zeros is not None:
            numbers -= np.asarray(weights.zeros, np.float64)[..., k // block_in]
        rows = np.arange(num_n) // form.block_out
        out[..., k] = numbers * scales[..., rows, k // block_in]
    return out


def lower_for_cuda(call: Any, *shapes: Any) -> str:
    """The text of a program lowered for CUDA."""
    return jax.jit(call).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def draw(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


@pytest.mark.core
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_storing_loses_what_the_form_says(name, case, rng):
    form, weights = FORMATS[name], draw(rng, 2, case.width_out, case.width_in)
    # Half a step of the block: of int8 1/254 of its largest magnitude, of 4 bits at most 1/15 of
    # the range, but a whole one, 1/8, where +8 would be needed; float8 has 3 bits of mantissa.
    block = (form.block_out, form.block_in or case.width_in)
    lead = np.abs(weights)
    largest = np.zeros_like(lead)
    for n in range(0, case.width_out, block[0]):
        for k in range(0, case.width_in, block[1]):
            part = np.s_[:, n : n + block[0], k : k + block[1]]
            largest[part] = lead[part].max(axis=(1, 2), keepdims=True)
    allowed = {
        "int8": largest / 254,
        "int4": largest / 8,
        "uint4": largest / 7.4,
        "float8_e4m3fn": lead / 16,
    }
    for array in (weights, jnp.asarray(weights)):  # on the host and on a device
        stored = quantise(array, form)
        stored.check("stored")
        whole = stands_for(stored)
        assert (np.abs(whole - weights) <= allowed[form.dtype] * 1.01 + largest * 2e-3).all()
    np.testing.assert_allclose(stored.dequantised(jnp.float32), whole, rtol=1e-6)


@pytest.mark.core
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_products_are_those_of_what_is_stored(name, implementation, rng):
    for case in CASES:
        stored = quantise(jnp.asarray(draw(rng, case.width_out, case.width_in)), FORMATS[name])
        for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 6e-3)):
            lhs = jnp.asarray(draw(rng, 2, case.rows, case.width_in), dtype)
            want = np.asarray(lhs, np.float64) @ stands_for(stored).T
            got = quantised_matmul(lhs, stored, implementation=implementation)
            assert got.dtype == dtype
            assert relative_error(got, want) < tolerance
            wide = quantised_matmul(
                lhs, stored, out_dtype=jnp.float32, implementation=implementation
            )
            assert wide.dtype == jnp.float32
            assert relative_error(wide, want) < tolerance


# Rows of each group, and rows of none: few, so that each reads its own matrix; some, of which the
# largest group needs a second pass; and so many that each matrix is widened once.
COUNTS = {
    "few": ([3, 0, 5, 1, 4], 3),
    "some": ([2, 0, 81, 1, 4], 5),
    "many": ([60, 0, 9, 90, 7], 2),
}


@pytest.mark.parametrize("rows", COUNTS)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_groups_multiply_by_what_is_stored_of_them(name, implementation, rows, rng):
    counts, extra = COUNTS[rows]
    total = sum(counts)
    gate, up = (quantise(draw(rng, 2, 5, 40, 202), FORMATS[name]) for _ in range(2))
    group = np.repeat(np.arange(5), counts)
    lhs = jnp.asarray(draw(rng, total + extra, 202))

    def products(weights: QuantisedWeights, first: int = 0, last: int = 5) -> np.ndarray:
        matrices = stands_for(weights)[1]
        found = np.zeros((total + extra, 40))
        for row, number in enumerate(group):
            if first <= number < last:
                found[row] = matrices[number] @ np.asarray(lhs[row], np.float64)
        return found

    layer = jnp.int32(1)
    of_stack = [LayerOfStack(jax.tree.map(jnp.asarray, stack), layer) for stack in (gate, up)]
    taken = [one.take() for one in of_stack]
    sizes = jnp.asarray(counts, jnp.int32)
    both: tuple[list[Any], ...] = (of_stack, taken)
    for weights in both:
        got = grouped_matmul(lhs, weights[0], sizes, implementation=implementation)
        assert relative_error(got, products(gate)) < 1e-5
        hidden = grouped_swiglu(lhs, weights[0], weights[1], sizes, implementation=implementation)
        gates = products(gate)
        assert relative_error(hidden, gates / (1 + np.exp(-gates)) * products(up)) < 1e-5
    held = jax.tree.map(lambda leaf: leaf[2:4], taken[0])
    got = grouped_matmul(lhs, held, sizes, group_offset=2, implementation=implementation)
    assert relative_error(got, products(gate, 2, 4)) < 1e-5


# Zipf's rows by group, one group with all, groups of none.
HOPPER_FORMATS = {**FORMATS, "int4_g64": Format("int4", 64)}
SPREADS = (
    [40, 21, 0, 13, 9, 5, 3, 1],
    [0, 0, 0, 120, 0, 0, 0, 0],
    [0] * 8,
    [1, 0, 2, 0, 0, 1, 0, 2],
)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a Hopper GPU")
@pytest.mark.parametrize("name", HOPPER_FORMATS)
@pytest.mark.parametrize(("width_out", "width_in"), [(192, 384), (128, 448)])
def test_hopper_multiplies_by_what_is_stored_in_a_stack(name, width_out, width_in, rng):
    shape = (2, 3, 8, width_out, width_in)
    gate, up = (quantise(draw(rng, *shape[1:]), HOPPER_FORMATS[name]) for _ in range(2))
    stacks = [jax.tree.map(jnp.asarray, stack) for stack in (gate, up)]
    lhs = jnp.asarray(draw(rng, 125, width_in) * width_in**-0.5, jnp.bfloat16)

    @jax.jit
    def both(lhs, stacks, layer, sizes):
        gate, up = (LayerOfStack(stack, layer) for stack in stacks)
        product = grouped_matmul(lhs, gate, sizes, implementation="hopper")
        return product, grouped_swiglu(lhs, gate, up, sizes, implementation="hopper")

    # With zero points numbers are rounded before these come off: twice as large ones.
    bound = 8e-3 if HOPPER_FORMATS[name].zero_points else 6e-3
    for counts in SPREADS:
        group = np.repeat(np.arange(8), counts)
        gates, ups = np.zeros((2, 125, width_out))
        for row, number in enumerate(group):
            x = np.asarray(lhs[row], np.float64)
            gates[row], ups[row] = (stands_for(w)[1, number] @ x for w in (gate, up))
        found = both(lhs, stacks, jnp.int32(1), jnp.asarray(counts, jnp.int32))
        for got, want in zip(found, (gates, gates / (1 + np.exp(-gates)) * ups), strict=True):
            assert not np.asarray(got, np.float64)[len(group) :].any()
            assert relative_error(got, want) < bound if want.any() else not np.asarray(got).any()


@pytest.mark.parametrize("name", ["int4_g64", "int4_g32"])
def test_hopper_copies_no_stack_of_a_form_that_it_reads(name):
    """Lowered for CUDA: the whole stack goes to the kernel; of another form XLA takes a layer."""
    form = HOPPER_FORMATS[name]
    stack = jax.eval_shape(lambda: quantise(jnp.zeros((3, 8, 128, 256)), form))

    def run(lhs, stack, sizes, layer):
        weights = LayerOfStack(stack, layer)
        return grouped_swiglu(lhs, weights, weights, sizes, implementation="hopper")

    arguments = (
        jax.ShapeDtypeStruct((48, 256), jnp.bfloat16),
        stack,
        jax.ShapeDtypeStruct((8,), jnp.int32),
        jax.ShapeDtypeStruct((), jnp.int32),
    )
    text = lower_for_cuda(run, *arguments)
    reads = name != "int4_g32"
    assert text.count("mosaic_gpu_v2") == reads
    assert ("stablehlo.dynamic_slice" not in text and "stablehlo.gather" not in text) == reads


READ_ON_HOPPER = [name for name, form in HOPPER_FORMATS.items() if hopper_refusal(form) is None]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("name", READ_ON_HOPPER)
def test_hopper_reads_a_matrix_of_few_rows(name, dtype):
    """Lowered for CUDA: one kernel, which takes the numbers as they are stored."""
    for width_in, width_out in ((2048, 576), (10944, 2048)):
        wide = jax.ShapeDtypeStruct((width_out, width_in), jnp.float32)
        stored = jax.eval_shape(lambda w: quantise(w, HOPPER_FORMATS[name]), wide)

        def run(lhs, stored):
            return quantised_matmul(lhs, stored, out_dtype=dtype, implementation="hopper")

        for rows, kernels in ((1, 1), (128, 1), (129, 0)):
            lhs = jax.ShapeDtypeStruct((rows, width_in), jnp.bfloat16)
            text = lower_for_cuda(run, lhs, stored)
            assert text.count("mosaic_gpu_v2") == kernels
            assert ("stablehlo.dot_general" in text) == (not kernels)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a Hopper GPU")
@pytest.mark.parametrize("name", READ_ON_HOPPER)
@pytest.mark.parametrize(("width_out", "width_in"), [(192, 384), (128, 448)])
def test_hopper_multiplies_few_rows_by_what_is_stored(name, width_out, width_in, rng):
    stored = quantise(draw(rng, width_out, width_in), HOPPER_FORMATS[name])
    on_device = jax.tree.map(jnp.asarray, stored)
    for rows in (1, 16, 100):
        lhs = jnp.asarray(draw(rng, 2, rows // 2 + 1, width_in) * width_in**-0.5, jnp.bfloat16)
        want = np.asarray(lhs, np.float64) @ stands_for(stored).T
        for dtype, bound in ((jnp.bfloat16, 6e-3), (jnp.float32, 3e-3)):
            got = quantised_matmul(lhs, on_device, out_dtype=dtype, implementation="hopper")
            assert got.dtype == dtype
            assert relative_error(got, want) < bound


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"form": Format("int4", 32)}, "blocks of 32 x 1 weights must be of 64 or 128 along K"),
        ({"form": Format("uint4", 64)}, "weights dtype uint4 must have no zero points"),
        ({"dtype": jnp.float32}, "dtype float32 must be bfloat16"),
        ({"width_in": 202}, "input width 202 must be a multiple of 64"),
        ({"width_out": 96}, "output width 96 must be a multiple of 64"),
    ],
)
def test_what_hopper_does_not_read_is_named(change, message):
    sizes = {"width_in": 128, "width_out": 64, "dtype": jnp.bfloat16, "form": Format("int8")}
    assert supported("hopper", **sizes) is None
    assert supported("hopper", **sizes | change) == message


@pytest.mark.core
@pytest.mark.parametrize("unrolled", [False, True])
@pytest.mark.parametrize("quantised", [False, True])
def test_this_jax_knows_the_options_of_generation(quantised, unrolled):
    assert not inference_options("cpu", quantised=quantised, unrolled=unrolled)
    options = inference_options("gpu", quantised=quantised, unrolled=unrolled)
    assert len(options) == (1 if quantised and not unrolled else 3)
    for option, value in options.items():
        jax.jit(jnp.sin).lower(1.0).compile(compiler_options={option: value})
        with pytest.raises(Exception, match=f"{option}_"):
            jax.jit(jnp.cos).lower(1.0).compile(compiler_options={f"{option}_": value})


@pytest.mark.usefixtures("unchecked_annotations")
def test_what_does_not_fit_is_named(rng):
    stored = quantise(jnp.asarray(draw(rng, 6, 10)), FORMATS["int4_g32"])
    lhs = jnp.ones((2, 12), jnp.float32)
    with pytest.raises(ValueError, match=r"rhs: shape \(10, 6\) must be \[K, N\]"):
        quantised_matmul(lhs, stored, implementation="xla")
    with pytest.raises(ValueError, match="'cuda' must be one of"):
        quantised_matmul(lhs[:, :10], stored, implementation="cuda")
    with pytest.raises(ValueError, match="dtype float16 must be bfloat16 or float32"):
        quantised_matmul(lhs[:, :10].astype(jnp.float16), stored, implementation="xla")
    bad = QuantisedWeights(stored.values, stored.scales[:, :0], None, stored.format)
    with pytest.raises(ValueError, match=r"rhs.scales: shape \(6, 0\) must be \(6, 1\)"):
        quantised_matmul(lhs[:, :10], bad, implementation="xla")
    sizes = jnp.asarray([2], jnp.int32)
    by_group = jax.tree.map(lambda leaf: leaf[None], stored)
    with pytest.raises(ValueError, match="transpose_rhs True must be False for QuantisedWeights"):
        grouped_matmul(lhs[:, :6], by_group, sizes, transpose_rhs=True, implementation="xla")
    with pytest.raises(ValueError, match="have no gradient"):
        jax.grad(lambda lhs: jnp.sum(grouped_matmul(lhs, by_group, sizes, implementation="xla")))(
            lhs[:, :10]
        )


@pytest.mark.core
@pytest.mark.parametrize("dtype", [jnp.int4, jnp.uint4])
def test_two_numbers_share_a_byte_of_a_file(dtype, rng):
    low = -8 if dtype == jnp.int4 else 0
    for width in (10, 7):
        values = rng.integers(low, low + 16, (3, width)).astype(np.int8).astype(dtype)
        packed = pack_halves(values)
        assert (packed.dtype, packed.shape) == (np.uint8, (3, -(-width // 2)))
        assert packed[1, 0] == int(values[1, 0]) % 16 + 16 * (int(values[1, 1]) % 16)
        np.testing.assert_array_equal(packed, pack_halves(jnp.asarray(values)))
        np.testing.assert_array_equal(unpack_halves(packed, width, dtype), values)
