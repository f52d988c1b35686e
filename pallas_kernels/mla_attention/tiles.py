"""Tile sizes of latent attention, by implementation and chip."""

import dataclasses

from pallas_kernels.chips import tpu_chip

# Queries and keys of a block of the plain JAX path: a cache holds it, and the steps are few.
XLA_BLOCK = 512


@dataclasses.dataclass(frozen=True)
class TpuTile:
    """How a TPU kernel cuts its work.

    Attributes:
        block: queries and keys of a grid step, what is held in VMEM.
        part: queries and keys that the kernel's code is for; the backward kernel runs it in a
            loop over a block's parts, the forward kernel has one part.
        chunk_q: queries of a tile, whose scores are computed at once.
        chunk_k: keys of a tile.
        keys_outer: whether a step goes through its keys' chunks in the outer loop.
        lag: the most tiles of the forward kernel that a step leaves to the next one with their
            scores computed, and as many with their weights; 0 where it finishes them.
        sum_on_mxu: whether the forward kernel sums the weights by a row of ones in the values.
    """

    block: int
    part: int
    chunk_q: int
    chunk_k: int
    keys_outer: bool
    lag: int = 0
    sum_on_mxu: bool = False

    def order(self, heads: int, block_q: int, block_k: int) -> list[tuple[int, slice, slice]]:
        """Returns a step's tiles (head, queries, keys) in the order in which they are issued.

        The first keys come last: no query of a block on the diagonal misses them.
        """
        queries, keys = _cut(block_q, self.chunk_q), _cut(block_k, self.chunk_k)[::-1]
        if self.keys_outer:
            return [(h, q, k) for k in keys for h in range(heads) for q in queries]
        return [(h, q, k) for h in range(heads) for q in queries for k in keys]


def _cut(size: int, chunk: int) -> list[slice]:
    if size % chunk:
        chunk = size
    return [slice(start, start + chunk) for start in range(0, size, chunk)]


# With the 256-wide MXU of v6e and 7x the vector unit is as busy: what a step would finish alone is
# held for the next one, and the MXU sums. A 128-wide one keeps v5e and v5p waiting for it anyway.
TPU_FORWARD = TpuTile(
    block=1024, part=1024, chunk_q=256, chunk_k=256, keys_outer=True, lag=2, sum_on_mxu=True
)
TPU_FORWARD_NARROW = TpuTile(
    block=1024, part=1024, chunk_q=512, chunk_k=256, keys_outer=True, sum_on_mxu=True
)
TPU_BACKWARD = TpuTile(block=1024, part=1024, chunk_q=256, chunk_k=512, keys_outer=False)
# A quarter of the code, which compiles faster and keeps a narrow MXU as busy.
TPU_BACKWARD_NARROW = dataclasses.replace(TPU_BACKWARD, part=512)
# Queries whose gradient the backward kernel keeps in VMEM: 1.5 KiB each for a pair of heads.
TPU_RESIDENT_TOKENS = 16384
# Of 64 MiB of VMEM on v5p and 7x, 128 MiB on v5e and v6e.
TPU_VMEM_BYTES = 56 * 2**20


def tpu_forward_tile() -> TpuTile:
    """Tile of the forward kernel for the chip that is compiled for."""
    return TPU_FORWARD if tpu_chip().wide else TPU_FORWARD_NARROW


def tpu_backward_tile() -> TpuTile:
    """Tile of the backward kernel for the chip that is compiled for."""
    return TPU_BACKWARD if tpu_chip().wide else TPU_BACKWARD_NARROW


@dataclasses.dataclass(frozen=True)
class HopperForwardTile:
    """Tiles of the Hopper forward kernel."""

    block_k: int = 128  # Keys of a step.
    stages: int = 2  # Steps' keys and values held in shared memory.
    heads_per_group: int = 4  # Heads computed at a time, which share the L2 cache.


@dataclasses.dataclass(frozen=True)
class HopperBackwardTile:
    """Tiles of the Hopper backward kernel."""

    stages: int = 2  # Steps' queries and gradients of outputs held in shared memory.
    heads_per_group: int = 8  # Heads computed at a time, which share the L2 cache.


HOPPER_FORWARD = HopperForwardTile()
HOPPER_BACKWARD = HopperBackwardTile()
