"""Parts that the Hopper kernels of several ops are built from: layouts, parameters, waits."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

# Parameters of kernels that place all their barriers themselves: no thread reads what another one
# wrote without one.
COMPILER_PARAMS = plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True)
# Of kernels that look at one buffer in two ways: Lane semantics keep the views as they are written.
LANE_COMPILER_PARAMS = plgpu.CompilerParams(
    lowering_semantics=plgpu.LoweringSemantics.Lane,
    unsafe_no_auto_barriers=True,
    approx_math=True,
)
# Layouts of registers: of a product, and of what broadcasts along its columns or its rows.
MATRIX = plgpu.Layout.WGMMA
PER_ROW = plgpu.Layout.WGMMA.reduce(1)
PER_COLUMN = plgpu.Layout.WGMMA.reduce(0)


def store_global(ref: Any, array: Array) -> None:
    """Stores to global memory, in pieces of any size.

    jax 0.12 refuses pieces that are not whole sectors of 32 bytes unless told otherwise, as a
    result's are where they are stored once and transposed; jax 0.11 has no such rule.
    """
    store = getattr(plgpu, "store", None)
    if store is None:
        ref[...] = array
    else:
        store(ref, array, optimized=False)


def swizzled(swizzle: int = 128) -> tuple[plgpu.SwizzleTransform]:
    """The layout of whole rows of so many bytes."""
    return (plgpu.SwizzleTransform(swizzle),)  # type: ignore[abstract]


def tiled(dtype: DTypeLike, swizzle: int = 128) -> tuple[Any, ...]:
    """The layout that wgmma reads: pieces of 8 rows of `swizzle` bytes."""
    columns = swizzle // jnp.dtype(dtype).itemsize
    pieces = plgpu.TilingTransform((8, columns))  # type: ignore[abstract]
    return (pieces, *swizzled(swizzle))


def tiled_smem(shape: Sequence[int], dtype: DTypeLike, swizzle: int = 128) -> Any:
    """An allocation of shared memory in the layout that wgmma reads."""
    return plgpu.SMEM(tuple(shape), dtype, transforms=tiled(dtype, swizzle))


def row_views_smem(shape: Sequence[int], dtype: DTypeLike) -> Any:
    """Memory of rows of 128 bytes in two views: what wgmma reads, and whole rows as TMA takes them.

    TMA begins at any row only in the second; the two orders are the same bytes.
    """
    return plgpu.RefUnion(
        tiled_smem(shape, dtype), plgpu.SMEM(tuple(shape), dtype, transforms=swizzled())
    )


def finish(acc_ref: Any, in_flight: int) -> Array:
    """An accumulator's value, once no more than so many products are in flight."""
    value = plgpu.wgmma_accumulator_load(acc_ref, wait_n=in_flight)
    # The barrier keeps the compiler from reading the registers before the wait.
    return lax.optimization_barrier(value)
