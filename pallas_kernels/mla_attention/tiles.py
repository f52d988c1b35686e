"""Tile sizes of latent attention, by implementation and chip."""

import dataclasses

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
        sum_on_mxu: whether the forward kernel sums the weights by a row of ones in the values.
    """

    block: int
    part: int
    chunk_q: int
    chunk_k: int
    keys_outer: bool
    sum_on_mxu: bool = False

    def order(self, heads: int, block_q: int, block_k: int) -> list[tuple[int, slice, slice]]:
        """Returns a step's tiles (head, queries, keys) in the order in which they are issued."""
        queries, keys = _cut(block_q, self.chunk_q), _cut(block_k, self.chunk_k)
        if self.keys_outer:
            return [(h, q, k) for k in keys for h in range(heads) for q in queries]
        return [(h, q, k) for h in range(heads) for q in queries for k in keys]


def _cut(size: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, size)) for start in range(0, size, chunk)]


# A 128-wide MXU keeps v5e and v5p waiting for it; with the 256-wide one of v6e and 7x the vector
# unit is as busy, and is spared the sums.
TPU_FORWARD = TpuTile(
    block=1024, part=1024, chunk_q=512, chunk_k=256, keys_outer=True, sum_on_mxu=True
)
TPU_BACKWARD = TpuTile(block=1024, part=512, chunk_q=256, chunk_k=512, keys_outer=False)
# Queries whose gradient the backward kernel keeps in VMEM: 1.5 KiB each for a pair of heads.
TPU_RESIDENT_TOKENS = 16384
# Of 64 MiB of VMEM on v5p and 7x, 128 MiB on v5e and v6e.
TPU_VMEM_BYTES = 56 * 2**20


@dataclasses.dataclass(frozen=True)
class HopperForward:
    """Tiles of the Hopper forward kernel."""

    block_k: int = 128  # Keys of a step.
    stages: int = 2  # Steps' keys and values held in shared memory.
    heads_per_group: int = 4  # Heads computed at a time, which share the L2 cache.


@dataclasses.dataclass(frozen=True)
class HopperBackward:
    """Tiles of the Hopper backward kernel."""

    stages: int = 2  # Steps' queries and gradients of outputs held in shared memory.
    heads_per_group: int = 8  # Heads computed at a time, which share the L2 cache.


HOPPER_FORWARD = HopperForward()
HOPPER_BACKWARD = HopperBackward()
