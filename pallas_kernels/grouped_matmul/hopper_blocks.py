"""What the Hopper kernels share: views of shared memory, the order of tiles, registers."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import mosaic_gpu as plgpu

# Columns in one swizzled row of 128 bytes; also the contraction step of a stage.
LANE = 64
ROWS = (plgpu.SwizzleTransform(128),)
BYTE_PIECES = (  # As PIECES, of one-byte values.
    plgpu.TilingTransform((8, LANE)),
    plgpu.SwizzleTransform(64),
)
PIECES = (plgpu.TilingTransform((8, LANE)), *ROWS)
COMPILER_PARAMS = plgpu.CompilerParams(
    # Lane semantics keep the two views of one shared-memory buffer as they are written.
    lowering_semantics=plgpu.LoweringSemantics.Lane,
    # No thread reads what another wrote without a barrier that the kernels place themselves.
    unsafe_no_auto_barriers=True,
    approx_math=True,
)


def raster(local: Array, rows: Array | int, columns: int, band: int) -> tuple[Array, Array]:
    """Row and column of a tile: down the rows of a band, then over the columns, then the next band.

    Tiles that run at one time then share both their rows and their weights in L2.
    """
    index = lax.div(local, band * columns)
    local = lax.rem(local, band * columns)
    height = jnp.minimum(band, rows - index * band)
    return index * band + lax.rem(local, height), lax.div(local, height)


def give_registers(count: int, action: Literal["increase", "decrease"], compute_wgs: int) -> None:
    """Move registers from the loading warpgroup to two compute warpgroups; one has enough."""
    if compute_wgs == 2:
        plgpu.set_max_registers(count, action=action)


def vary_like(array: Array, reference: Array) -> Array:
    """A kernel's result, varying over the manual mesh axes over which its operand does.

    Mosaic GPU kernels forget those axes, and shard_map holds custom gradients to them.
    """
    forgotten = (
        jax.typeof(reference).manual_axis_type.varying - jax.typeof(array).manual_axis_type.varying
    )
    return lax.pcast(array, tuple(sorted(forgotten)), to="varying") if forgotten else array
