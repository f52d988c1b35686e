"""Hopper's kernels of grouped_matmul: lowered for CUDA, and run where there is a card."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import (
    BlockScaledWeights,
    LayerOfStack,
    block_scaled,
    grouped_matmul,
    grouped_swiglu,
)


def lower_for_cuda(call, *shapes):
    """The text of a program lowered for CUDA: Mosaic GPU has then checked shapes and memory."""
    return jax.jit(call).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def hopper_shapes(num_rows, width_in, width_out, num_groups):
    bf16 = jnp.bfloat16
    return (
        jax.ShapeDtypeStruct((num_rows, width_in), bf16),
        jax.ShapeDtypeStruct((num_groups, width_in, width_out), bf16),
        jax.ShapeDtypeStruct((num_groups,), jnp.int32),
    )


# V2-Lite's experts in training and V2's in decoding, then rows that no tile divides.
@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [(49152, 2048, 1408, 64), (48, 5120, 1536, 160), (1, 1536, 5120, 8), (323, 128, 192, 3)],
)
def test_hopper_lowers(sizes):
    lhs, rhs, group_sizes = hopper_shapes(*sizes)

    def run(lhs, gate, up, group_sizes):
        out = grouped_matmul(lhs, gate, group_sizes, implementation="hopper")
        return out, grouped_swiglu(lhs, gate, up, group_sizes, implementation="hopper")

    # Products and SwiGLU, each one kernel.
    assert lower_for_cuda(run, lhs, rhs, rhs, group_sizes).count("mosaic_gpu_v2") == 2


@pytest.mark.parametrize(
    ("dtype", "num_rows"), [("int8", 6), ("int8", 4096), ("float8_e4m3fn", 384)]
)
def test_hopper_lowers_quantised_weights(dtype, num_rows):
    lhs, _, group_sizes = hopper_shapes(num_rows, 256, 384, 8)
    values = jax.ShapeDtypeStruct((8, 256, 384), jnp.dtype(dtype))
    scales = jax.ShapeDtypeStruct((8, 2, 3), jnp.float32)

    def run(lhs, values, scales, group_sizes):
        rhs = BlockScaledWeights(values, scales)
        out = grouped_matmul(lhs, rhs, group_sizes, implementation="hopper")
        return out, grouped_swiglu(lhs, rhs, rhs, group_sizes, implementation="hopper")

    assert lower_for_cuda(run, lhs, values, scales, group_sizes).count("mosaic_gpu_v2") == 2


def test_hopper_copies_no_stack_of_layers():
    """Lowered for CUDA: all layers' matrices go to the kernel, which reads one layer's."""
    lhs, rhs, group_sizes = hopper_shapes(4096, 128, 192, 8)
    stack = jax.ShapeDtypeStruct((5, *rhs.shape), rhs.dtype)

    def run(lhs, gate, up, layer, group_sizes):
        gate, up = LayerOfStack(gate, layer), LayerOfStack(up, layer)
        out = grouped_matmul(lhs, gate, group_sizes, implementation="hopper")
        return out, grouped_swiglu(lhs, gate, up, group_sizes, implementation="hopper")

    text = lower_for_cuda(run, lhs, stack, stack, jax.ShapeDtypeStruct((), jnp.int32), group_sizes)
    assert text.count("mosaic_gpu_v2") == 2
    assert "stablehlo.dynamic_slice" not in text
    assert "stablehlo.gather" not in text


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a Hopper GPU")
@pytest.mark.parametrize("num_rows", [5, 300, 5000])
def test_hopper_reads_a_layer_where_it_lies(num_rows, rng):
    stacks = rng.standard_normal((2, 3, 8, 128, 192)).astype(np.float32) * 128**-0.5
    stacks = jnp.asarray(stacks, jnp.bfloat16)
    lhs = jnp.asarray(rng.standard_normal((num_rows, 128)), jnp.bfloat16)
    sizes = jnp.asarray(rng.multinomial(num_rows - num_rows // 5, [1 / 8] * 8), jnp.int32)

    @jax.jit
    def both(gates, ups, layer):
        gate, up = LayerOfStack(gates, layer), LayerOfStack(ups, layer)
        product = grouped_matmul(lhs, gate, sizes, implementation="hopper")
        return product, grouped_swiglu(lhs, gate, up, sizes, implementation="hopper")

    for layer in range(3):
        gate, up = stacks[:, layer]
        want = grouped_matmul(lhs, gate, sizes, implementation="hopper")
        swiglu = grouped_swiglu(lhs, gate, up, sizes, implementation="hopper")
        found = both(*stacks, jnp.int32(layer))
        np.testing.assert_array_equal(found[0], want)
        np.testing.assert_array_equal(found[1], swiglu)


@pytest.mark.slow
def test_hopper_lowers_gradients():
    lhs, rhs, group_sizes = hopper_shapes(4096, 2048, 1408, 64)

    def loss(lhs, gate, up, group_sizes):
        hidden = grouped_swiglu(lhs, gate, up, group_sizes, implementation="hopper")
        down = jnp.swapaxes(up, 1, 2)
        return grouped_matmul(hidden, down, group_sizes, implementation="hopper").sum()

    gradient = jax.value_and_grad(loss, argnums=(0, 1, 2))
    # Forward 2; backward: rows and weights of the product, rows and two weights of SwiGLU.
    assert lower_for_cuda(gradient, lhs, rhs, rhs, group_sizes).count("mosaic_gpu_v2") == 7


def test_hopper_lowers_inside_shard_map():
    """Experts sharded: each shard has its own offset, and rows that all shards hold."""
    mesh = jax.make_mesh((1,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    lhs, rhs, group_sizes = hopper_shapes(256, 128, 128, 4)
    own, whole = jax.P("expert"), jax.P()

    def loss(lhs, gate, up, group_sizes):
        offset = jax.lax.axis_index("expert") * 4
        out = grouped_swiglu(
            lhs, gate, up, group_sizes, group_offset=offset, implementation="hopper"
        )
        return jax.lax.psum(out.astype(jnp.float32).sum(), "expert")

    sharded = jax.shard_map(loss, mesh=mesh, in_specs=(whole, own, own, whole), out_specs=whole)
    gradient = jax.value_and_grad(sharded, argnums=(0, 1, 2))
    # Products with SwiGLU, then the gradients of the rows and of both weights.
    assert lower_for_cuda(gradient, lhs, rhs, rhs, group_sizes).count("mosaic_gpu_v2") == 4


@pytest.mark.parametrize(
    ("lhs_dtype", "widths", "message"),
    [
        (jnp.float32, (128, 128), "dtype float32 must be bfloat16"),
        (jnp.bfloat16, (96, 128), "input width 96 must be a multiple of 64"),
        (jnp.bfloat16, (128, 96), "output width 96 must be a multiple of 64"),
    ],
)
def test_hopper_refuses(lhs_dtype, widths, message):
    lhs = jnp.ones((8, widths[0]), lhs_dtype)
    rhs = jnp.ones((2, *widths), lhs_dtype)
    with pytest.raises(ValueError, match=message):
        grouped_matmul(lhs, rhs, jnp.array([4, 4]), implementation="hopper")


def test_hopper_refuses_transposed_quantised_weights():
    rhs = block_scaled(jnp.ones((2, 128, 128)), jnp.int8)
    with pytest.raises(ValueError, match="transpose_rhs True must be False for quantised"):
        grouped_matmul(
            jnp.ones((8, 128), jnp.bfloat16),
            rhs,
            jnp.array([4, 4]),
            transpose_rhs=True,
            implementation="hopper",
        )
