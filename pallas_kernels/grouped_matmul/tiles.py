"""Measured tile sizes of the grouped matmul kernels, by chip and shape."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class HopperTile:
    """Sizes of one output tile of a Hopper kernel.

    Attributes:
        block_m: rows of a tile; below 128 the two compute warpgroups split its columns.
        block_n: columns of a tile, of each of the two products when SwiGLU is fused.
        stages: blocks of 64 of the contraction held in shared memory.
        band: rows of tiles taken together before going on to the next column.
    """

    block_m: int
    block_n: int
    stages: int
    band: int


# Where no GPU is at hand (lowering on a CPU host): H100 SXM and H200.
HOPPER_MULTIPROCESSORS = 132


def num_multiprocessors() -> int:
    """Multiprocessors of the GPU, or of an H200 on a host without one."""
    device = jax.devices()[0]
    return device.core_count if device.platform == "gpu" else HOPPER_MULTIPROCESSORS


def hopper_tile(
    num_rows: int, num_groups: int, num_n: int, activation: bool, quantised: bool
) -> HopperTile:
    """Tile of the rows kernel, by the mean number of rows of a group.

    Few rows: low tiles, many stages, and two blocks of 64 columns, so that the weights stream.
    Quantised weights are widened by the warpgroup that multiplies them, so a tile stays low.
    """
    mean = num_rows / num_groups
    if mean <= 32:
        return HopperTile(16 if mean <= 8 else 32, 64 if activation else 128, 8, 16)
    if mean <= 64 or quantised:
        return HopperTile(64, 128, 4, 16) if activation or quantised else HopperTile(64, 256, 4, 16)
    if activation or (num_n % 256 and mean > 128):
        return HopperTile(128, 128, 4, 16) if activation else HopperTile(256, 128, 4, 16)
    return HopperTile(128, 256, 4, 16)


def weight_gradient_tile(num_k: int) -> HopperTile:
    """Tile of the weight gradient kernel."""
    return HopperTile(256, 128, 4, 16) if num_k % 256 == 0 else HopperTile(128, 256, 4, 16)
