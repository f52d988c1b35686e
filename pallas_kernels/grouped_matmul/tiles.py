"""Measured tile sizes of the grouped matmul kernels, by chip and shape."""

import dataclasses

from pallas_kernels.chips import TPU_LANES, TpuChip, num_sms, tpu_chip


@dataclasses.dataclass(frozen=True)
class HopperTile:
    """Sizes of one output tile of a Hopper kernel.

    Attributes:
        block_m: rows of a tile; below 128 the two compute warpgroups split its columns.
        block_n: columns of a tile, of each of the two products when SwiGLU is fused.
        stages: blocks of 64 of the contraction held in shared memory.
        band: rows of tiles taken together before going on to the next column.
        tickets: deal tiles to blocks as they ask, not in turn. That costs setting a counter to 0,
            and evens out tiles that wait for memory.
    """

    block_m: int
    block_n: int
    stages: int
    band: int
    tickets: bool = False


def hopper_rows_tile(
    num_rows: int, num_groups: int, num_n: int, activation: bool, quantised: bool
) -> HopperTile:
    """Tile of the rows kernel, by the mean number of rows of a group.

    Few rows take low tiles, many stages and two blocks of 64 columns, so that the weights stream.
    Quantised weights are widened by the warpgroups that multiply them. Their tiles stay low, and
    four warpgroups take 64 columns each where there is shared memory for that and there are tiles
    for all blocks.
    """
    mean = num_rows / num_groups
    low = 16 if mean <= 8 else 32 if mean <= 32 else 64

    if quantised:
        # The time of the block with most tiles, in columns; wide tiles unless narrow ones save 1/5.
        touched, blocks = min(num_rows, num_groups), num_sms()
        narrow, wide = (-(-touched * -(-num_n // n) // blocks) * n for n in (128, 256))
        if not activation and 5 * narrow > 4 * wide:
            return HopperTile(low, 256, 4, 16)
        return HopperTile(low, 128, 8 if low < 64 and not activation else 4, 16)
    if mean <= 32:
        return HopperTile(low, 64 if activation else 128, 8, 16)
    if mean <= 64:
        return HopperTile(64, 128, 4, 16) if activation else HopperTile(64, 256, 4, 16)
    tickets = mean > 128
    if activation or (num_n % 256 and mean > 128):
        block_m, block_n = (128, 128) if activation else (256, 128)
    else:
        block_m, block_n = 128, 256
    return HopperTile(block_m, block_n, 4, 16, tickets)


def hopper_weight_gradient_tile(num_k: int, num_n: int) -> HopperTile:
    """Tile of the weight gradient kernel: wide ones read shared memory less often."""
    narrow = num_n % 256 and num_k % 256 == 0
    return HopperTile(256 if narrow else 128, 128 if narrow else 256, 4, 16, tickets=True)


# Multiplications of one stretch of code, about 4,000 cycles or 8,000: some 270 pass before its
# first results come, and longer code takes long to compile.
_TPU_BODY_WIDE, _TPU_BODY = 2**30, 2**29


@dataclasses.dataclass(frozen=True)
class TpuRowsTile:
    """Sizes of the TPU kernel over rows.

    Attributes:
        rows: most rows of a window, a multiple of `large`.
        large: rows multiplied at once.
        small: rows multiplied at once at a group's end.
        columns: columns of the outputs whose weights are in VMEM together.
        body_columns: columns multiplied at once.
        weight_buffers: groups whose weights are in VMEM or on their way there.
    """

    rows: int
    large: int
    small: int
    columns: int
    body_columns: int
    weight_buffers: int


def tpu_rows_tile(
    num_rows: int,
    num_groups: int,
    widths: tuple[int, int],
    *,
    transpose_rhs: bool,
    arrays: tuple[int, int, int],
    itemsizes: tuple[int, int],
    chip: TpuChip | None = None,
) -> TpuRowsTile:
    """Tile of the rows kernel: as few column tiles as fit, then as many weights ahead.

    Args:
        num_rows: rows of all groups.
        num_groups: number of all groups.
        widths: contracted width and columns.
        transpose_rhs: whether the weights are multiplied by transposed.
        arrays: number of inputs, of matrices a group, and of outputs.
        itemsizes: bytes of an element of the rows and of the weights.
        chip: the chip; None for the one that is compiled for.
    """
    chip = chip or tpu_chip()
    (depth, num_columns), (num_lhs, num_rhs, num_out) = widths, arrays
    itemsize, weight_itemsize = itemsizes
    mean = num_rows / num_groups
    if itemsize == 4:  # The same code takes six passes.
        rows, large, small = (256, 128, 64) if mean > 64 else (64, 32, 16)
    elif mean > 64:
        # Fewer rows take an MXU as long: it waits for the weights, and for transposed ones longer.
        small = (128 if chip.wide else 32) * (2 if transpose_rhs else 1)
        rows, large = 512, 256
    else:
        rows, large, small = (128, 64, 32) if mean > 16 else (64, 32, 16)

    def fits(columns: int, buffers: int) -> bool:
        weights = depth * columns * num_rhs
        wide = weights * itemsize if weight_itemsize != itemsize else 0
        moving = 2 * rows * (depth * num_lhs + columns * num_out) * itemsize
        taken = weights * weight_itemsize * buffers + wide + moving
        return taken <= chip.vmem_limit - 6 * 2**20

    lanes = num_columns // TPU_LANES
    parts = range(chip.cores, lanes + chip.cores, chip.cores)
    choices = [(-(-lanes // part) * TPU_LANES, n) for part in parts for n in (3, 2)]
    columns, buffers = next((choice for choice in choices if fits(*choice)), (TPU_LANES, 2))
    per_column = large * depth * num_rhs * (6 if itemsize == 4 else 1)
    bodies = max(1, round(columns * per_column / (_TPU_BODY_WIDE if chip.wide else _TPU_BODY)))
    body_columns = min(columns, -(-columns // (bodies * 256)) * 256)
    return TpuRowsTile(rows, large, small, columns, body_columns, buffers)


@dataclasses.dataclass(frozen=True)
class TpuWeightGradientTile:
    """Sizes of the TPU kernel of the weights' gradient.

    Attributes:
        rows: most rows of a window.
        depths: numbers of rows that a group's last window is multiplied with, the last being
            `rows`.
        height: rows of the gradient's tile.
        width: columns of the gradient's tile.
        body_height: rows of the tile multiplied at once.
    """

    rows: int
    depths: tuple[int, ...]
    height: int
    width: int
    body_height: int


def tpu_weight_gradient_tile(
    num_rows: int,
    num_groups: int,
    widths: tuple[int, int],
    itemsize: int,
    *,
    chip: TpuChip | None = None,
) -> TpuWeightGradientTile:
    """Tile of the weight gradient's kernel: as large as fits, as rows are read again for each.

    Args:
        num_rows: rows of all groups.
        num_groups: number of all groups.
        widths: the gradient's rows and columns.
        itemsize: bytes of an element.
        chip: the chip; None for the one that is compiled for.
    """
    chip = chip or tpu_chip()
    unit = 256 if chip.wide else 128
    rows = 2 * unit if itemsize == 2 and num_rows / num_groups > unit else unit

    def sizes(width: int) -> list[int]:
        return [n for n in range(TPU_LANES, width + 1, TPU_LANES) if width % n == 0]

    def fits(height: int, width: int) -> bool:
        moving = 2 * rows * (height + width) * itemsize
        taken = moving + height * width * (4 + itemsize)
        even = widths[0] // height * (widths[1] // width) % chip.cores == 0
        return even and taken <= chip.vmem_limit - 6 * 2**20

    choices = [(h, w) for h in sizes(widths[0]) for w in sizes(widths[1]) if fits(h, w)]
    height, width = min(
        choices, key=lambda tile: 1 / tile[0] + 1 / tile[1], default=(TPU_LANES,) * 2
    )
    per_row = rows * width * (6 if itemsize == 4 else 1)
    most = (_TPU_BODY_WIDE if chip.wide else _TPU_BODY) / per_row
    body_height = max(n for n in sizes(height) if n <= max(most, TPU_LANES))
    return TpuWeightGradientTile(
        rows, tuple(range(unit, rows + 1, unit)), height, width, body_height
    )
