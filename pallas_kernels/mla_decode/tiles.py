"""Tile sizes of absorbed decode, measured by `scripts/tune_mla_decode.py`, by chip."""

import dataclasses

from pallas_kernels.chips import HOPPER_SMS


@dataclasses.dataclass(frozen=True)
class HopperTile:
    """Sizes of the Hopper kernel.

    Attributes:
        num_sms: streaming multiprocessors of the chip: one thread block runs on each.
        narrow_rows: query tokens times heads up to which the kernel with keys as rows is taken.
        merge_rows: query rows that a thread block of the merge kernel takes, where there are many.
        merge_pieces: partial results that it loads at a time, at most.
        narrow_merge_pieces: the same of the kernel with keys as rows, which merges itself.
    """

    num_sms: int = HOPPER_SMS
    narrow_rows: int = 32
    merge_rows: int = 8
    merge_pieces: int = 33
    narrow_merge_pieces: int = 66


# Measured on H200; H100 takes the same. The SXM parts of both have 132 multiprocessors.
HOPPER = HopperTile()


@dataclasses.dataclass(frozen=True)
class TpuTile:
    """How the TPU kernel cuts its work.

    Attributes:
        block_tokens: cached tokens of a block, which are fetched together.
        chunk_tokens: tokens of a block whose scores are computed at once.
        buffers: blocks held in VMEM; all but one are on their way.
        splits: parts of a sequence, for chips of which two cores share a kernel.
        min_split_blocks: blocks of the page table per part below which it is not worth it.
    """

    block_tokens: int
    chunk_tokens: int
    buffers: int
    splits: int
    min_split_blocks: int


TPU = TpuTile(block_tokens=1024, chunk_tokens=1024, buffers=4, splits=2, min_split_blocks=4)
TPU_VMEM_BYTES = 48 * 2**20
