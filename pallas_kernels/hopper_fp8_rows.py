"""Rounds rows to float8 on Hopper in one pass; `fp8_rows.quantised_blocks` takes XLA two."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.fp8_rows import BLOCK, DTYPE, scales_of
from pallas_kernels.hopper_parts import LANE_COMPILER_PARAMS, row_views_smem, store_global
from pallas_kernels.hopper_row_ranges import store_rows
from pallas_kernels.manual_axes import vary_like

ROWS = 64  # of a block of threads, which has 128 columns of them
LAYOUT = plgpu.Layout.WGMMA_8BIT  # a thread has four numbers beside one another


def round_rows(rows_MK: Array, num_scales: int) -> tuple[Array, Array]:
    """Rounds each 128 columns of each row by a scale of their own.

    Args:
        rows_MK: bfloat16, K a multiple of 128.
        num_scales: rows of the scales, at least M rounded up to a multiple of 64; those beyond that
            are not written.

    Returns:
        float8_e4m3fn [M, K / 128, 128] and float32 scales [K / 128, num_scales].
    """
    num_rows, num_k = rows_MK.shape
    blocks = num_k // BLOCK
    assert num_scales >= pl.cdiv(num_rows, ROWS) * ROWS

    def body(*refs: Any) -> None:
        rows_ref, out_ref, scales_ref, rows_smem, (out_pieces, out_plain), loaded = refs
        # Blocks of threads side by side read what lies side by side.
        tile = lax.axis_index("tile")
        row, block = lax.div(tile, blocks) * ROWS, lax.rem(tile, blocks)
        window = rows_ref.at[pl.ds(row, ROWS), pl.ds(block * BLOCK, BLOCK)]
        plgpu.copy_gmem_to_smem(window, rows_smem, loaded)
        plgpu.barrier_wait(loaded)
        numbers = plgpu.load(rows_smem, layout=LAYOUT, optimized=False).astype(jnp.float32)
        scales, inverses = scales_of(jnp.max(jnp.abs(numbers), axis=1))
        store_global(scales_ref.at[block, pl.ds(row, ROWS)], scales)
        spread = lax.broadcast_in_dim(inverses, (ROWS, BLOCK), (0,))
        out_pieces[...] = (numbers * plgpu.layout_cast(spread, LAYOUT)).astype(DTYPE)
        store_rows(out_pieces, out_plain, out_ref.at[:, block], row, num_rows - row, ROWS)
        plgpu.wait_smem_to_gmem(0)

    kernel = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((num_rows, blocks, BLOCK), DTYPE),
            jax.ShapeDtypeStruct((blocks, num_scales), jnp.float32),
        ),
        grid=(pl.cdiv(num_rows, ROWS) * blocks,),
        grid_names=("tile",),
        scratch_types=[
            plgpu.SMEM((ROWS, BLOCK), rows_MK.dtype),
            row_views_smem((ROWS, BLOCK), DTYPE),
            plgpu.Barrier(num_arrivals=1),
        ],
        compiler_params=LANE_COMPILER_PARAMS,
    )
    values, scales = kernel(rows_MK)
    return vary_like(values, rows_MK), vary_like(scales, rows_MK)
