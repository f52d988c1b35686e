"""The permutation on Hopper (Pallas, Mosaic GPU): a token is read once and written K times.

XLA gathers instead, row by row, and reads a token K times over. Sums of rows are left to XLA.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.expert_permute.limits import HOPPER_THREADS
from pallas_kernels.expert_permute.order import ExpertOrder
from pallas_kernels.expert_permute.xla import dot_rows, sum_rows
from pallas_kernels.hopper_parts import LANE_COMPILER_PARAMS
from pallas_kernels.manual_axes import vary_like

__all__ = ["dot_rows", "spread_rows", "sum_rows"]

WARPGROUPS = 4  # Of a block; each takes one token.


def spread_rows(x_ND: Array, order: ExpertOrder, weights_NK: Array | None = None) -> Array:
    """Each token, times its weights where given, copied to its rows."""
    row_NK, num_rows = order.row_NK, order.token_M.shape[0]
    (num_tokens, width), num_copies = x_ND.shape, row_NK.shape[1]
    bytes_16 = 16 // x_ND.dtype.itemsize
    layout = plgpu.Layout.WG_STRIDED((width,), vec_size=math.gcd(width // HOPPER_THREADS, bytes_16))
    weights = [] if weights_NK is None else [weights_NK]

    def body(x_ref: Any, row_ref: Any, *refs: Any) -> None:
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
        compiler_params=LANE_COMPILER_PARAMS,
    )
    return vary_like(kernel(x_ND, row_NK, *weights), x_ND)
