"""Tokens copied to their experts' rows on Hopper: each is read once and written K times.

XLA gathers instead, row by row, and reads a token K times over.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul.hopper_blocks import COMPILER_PARAMS, vary_like

# A warpgroup takes one token.
WARPGROUPS = 4
THREADS = 128


def spread_rows(
    x_ND: Array, row_NK: Array, num_rows: int, weights_NK: Array | None = None
) -> Array:
    """Writes each token, times its weights where given, to its rows.

    Args:
        x_ND: tokens of a width that is a multiple of 128.
        row_NK: int32, the rows of each token; num_rows or more for none. Every row must be a
            token's.
        num_rows: M.
        weights_NK: float32 factor of each copy.

    Returns:
        Rows [M, D] of x's dtype.
    """
    (num_tokens, width), num_copies = x_ND.shape, row_NK.shape[1]
    bytes_16 = 16 // x_ND.dtype.itemsize
    layout = plgpu.Layout.WG_STRIDED((width,), vec_size=math.gcd(width // THREADS, bytes_16))
    weights = [] if weights_NK is None else [weights_NK]

    def body(x_ref, row_ref, *refs):
        *weight_refs, out_ref = refs
        token = lax.axis_index("block") * WARPGROUPS + lax.axis_index("wg")

        @pl.when(token < num_tokens)
        def _() -> None:
            values_D = plgpu.load(x_ref.at[token], layout=layout, optimized=False)
            for copy in range(num_copies):
                row, scaled_D = row_ref[token, copy], values_D
                if weight_refs:
                    scaled_D = values_D.astype(jnp.float32) * weight_refs[0][token, copy]

                @pl.when(row < num_rows)
                def _(row: Array = row, scaled_D: Array = scaled_D) -> None:
                    out_ref[row] = scaled_D.astype(out_ref.dtype)

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((num_rows, width), x_ND.dtype),
        grid=(pl.cdiv(num_tokens, WARPGROUPS),),
        grid_names=("block",),
        num_threads=WARPGROUPS,
        thread_name="wg",
        compiler_params=COMPILER_PARAMS,
    )
    return vary_like(kernel(x_ND, row_NK, *weights), x_ND)
