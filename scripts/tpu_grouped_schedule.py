"""Sets the experts' TPU kernels beside jax's megablox by their schedules, without a TPU.

    python scripts/tpu_grouped_schedule.py --chips v6e --shape 49152x2048x1408x64
    python scripts/tpu_grouped_schedule.py --shape 96x2048x1408x64 --stored int8 int4_g64

Both are compiled for the chip. The cycles of each stretch of code count as often as it runs for one
draw of group sizes (rows dealt to groups at random). Of megablox's tilings the best is shown.
Beside the cycles stand the bytes that the copies move, and the time that these take at the chip's
bandwidth. A kernel takes at least the longer of the two. Cycles and bytes are a core's. With
`--stored` our kernel for few rows stands there instead of megablox, by weights in these formats.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tpu_schedule
from arguments import command_line, names_of, numbers, one_line_errors, positive, several
from tpu_schedule import BYTES_PER_CYCLE, Region, Schedule

from dsjax.quantise import format_of
from pallas_kernels.grouped_matmul import tiles, tpu_quantised
from pallas_kernels.grouped_matmul.tpu_windows import ALIGN, make_windows

PROGRAMS = str(Path(__file__).with_name("tpu_grouped_programs.py"))
KINDS = ("forward", "rows-backward", "weights-backward", "swiglu")
DEVICES = {
    "v5e": ("TPU v5 lite", 1),
    "v5p": ("TPU v5", 2),
    "v6e": ("TPU v6 lite", 1),
    "tpu7x": ("TPU7x", 1),
}
# Formats that the kernel for stored weights reads.
STORED = ("int8", "fp8", "fp8_block128", "int4_g32", "int4_g64", "int4_g128")
# What megablox may take: it asks for no more VMEM than the compiler gives a kernel unasked.
MEGABLOX_VMEM = {"v5e": 2**24, "v5p": 2**24, "v6e": 2**25, "tpu7x": 2**25}


@dataclasses.dataclass(frozen=True)
class Problem:
    """One product: the shape of the forward pass, and the rows of each group."""

    kind: str
    shape: tuple[int, int, int, int]  # Rows, depth, columns, groups.
    sizes: tuple[int, ...]

    @property
    def widths(self) -> tuple[int, int]:
        """Contracted width and columns; for weights-backward rows and columns of the result."""
        _, depth, columns, _ = self.shape
        return (columns, depth) if self.kind == "rows-backward" else (depth, columns)

    @property
    def num_rhs(self) -> int:
        """Matrices of a group."""
        return 2 if self.kind == "swiglu" else 1

    @property
    def least_bytes(self) -> int:
        """Everything once, in bfloat16; weights only of the groups that have rows."""
        rows, depth, columns, groups = self.shape
        held = groups if self.kind == "weights-backward" else sum(n > 0 for n in self.sizes)
        return 2 * (rows * (depth + columns) + held * depth * columns * self.num_rhs)


@dataclasses.dataclass(frozen=True)
class Cost:
    """A kernel's cycles over its whole grid and the bytes it moves, of one core."""

    label: str
    schedule: Schedule
    bodies: tuple[tuple[Region, int], ...]  # Matmul regions and how often they run.
    cycles: float
    moved: float

    def row(self, problem: Problem, chip: str, peer: "Cost | None") -> str:
        """Returns a Markdown table row."""
        cores = DEVICES[chip][1]
        body, _ = max(self.bodies, key=lambda body: body[0].cycles * body[1])
        mxu = sum(r.used["MXU"] / r.capacity["MXU"] * trips for r, trips in self.bodies)
        loops = " + ".join(f"{r.cycles:,} × {trips:,}" for r, trips in self.bodies if trips)
        least = problem.least_bytes / cores
        memory = self.moved / (BYTES_PER_CYCLE[chip] / cores)
        ratio = f"{self.cycles / peer.cycles:.2f}" if peer else ""
        return (
            f"| {chip} | {self.label} | {loops} | {body.share('MXU'):.0%} | "
            f"{mxu / self.cycles:.0%} | {self.cycles / 1e6:.2f} | {ratio} | "
            f"{self.moved / 1e9:.2f} | {self.moved / least:.2f} | {memory / 1e6:.2f} | "
            f"{self.schedule.vmem_bytes / 2**20:.0f} |"
        )


HEADER = (
    "| chip | kernel | code: cycles × trips | MXU slots used there | MXU slots of all cycles | "
    "cycles, M | of the peer's | GB moved | of the least | cycles to move them, M | VMEM, MiB |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|"
)


def windows_of(problem: Problem, rows: int) -> list[tuple[int, int]]:
    """Returns each window's end of the valid rows, from its base, and its bits (`make_windows`)."""
    start_R = np.concatenate([[0], np.cumsum(problem.sizes)]).astype(np.int32)
    # Within a mesh of a chip that is not there nothing can be computed.
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        windows = make_windows(
            jax.numpy.asarray(start_R), rows, problem.shape[0], empty_ranges=False
        )
        (count,), _, _, _, high_W, bits_W = map(np.asarray, windows.scalars)
    return list(zip(high_W[:count].tolist(), bits_W[:count].tolist(), strict=True))


def sum_cycles(
    schedule: Schedule, trips: list[int], window_depth: int, tiles_run: int, windows: int
) -> tuple[tuple[tuple[Region, int], ...], int]:
    """Returns our kernel's matmul regions with their trips, and the cycles of the whole kernel.

    Code in the loop over windows counts once a window, though most windows skip much of it. Code
    that lies deeper counts as often as matmul code runs, the rest once a tile.
    """
    matmuls = [region for region in schedule.regions if region.used["MXU"]]
    bodies = tuple(zip(matmuls, trips, strict=True))
    cycles = sum(region.cycles * number for region, number in bodies)
    for region in schedule.regions:
        if not region.used["MXU"]:
            inside = tiles_run * windows if region.depth == window_depth else sum(trips)
            cycles += region.cycles * (inside if region.depth >= window_depth else tiles_run)
    return bodies, cycles


def our_cost(problem: Problem, chip: str) -> Cost:
    """Compiles our kernel for the problem and sums its cycles and bytes."""
    rows, depth, columns, groups = problem.shape
    device = jax.sharding.AbstractDevice(DEVICES[chip][0], DEVICES[chip][1], "tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("chip",), abstract_device=device)
    arguments = {"kind": problem.kind, "shape": list(problem.shape)}
    (schedule,) = tpu_schedule.compile_schedules(f"{PROGRAMS}:ours", arguments, chip, "grouped")
    cores = DEVICES[chip][1]
    with jax.sharding.use_abstract_mesh(mesh):
        if problem.kind == "weights-backward":
            tile = tiles.tpu_weight_gradient_tile(rows, groups, (depth, columns), 2)
            high = windows_of(problem, tile.rows)
            across, down = columns // tile.width, depth // tile.height
            number, loops = across * down // cores, tile.height // tile.body_height
            below = (0, *tile.depths[:-1])
            trips = [sum(not bits & 2 for _, bits in high)]
            for low, top in zip(below, tile.depths, strict=True):
                trips.append(sum(bool(bits & 2) and low < end <= top for end, bits in high))
            trips = [number * loops * n for n in trips]
            fetched = sum(-(-end // 16) * 16 for end, _ in high)
            moved = fetched * (depth * across + columns * down) + groups * depth * columns
        else:
            contracted, out = problem.widths
            rows_tile = tiles.tpu_rows_tile(
                rows,
                groups,
                problem.widths,
                transpose_rhs=problem.kind == "rows-backward",
                arrays=(1, problem.num_rhs, 1),
                itemsizes=(2, 2),
            )
            high = windows_of(problem, rows_tile.rows)
            column_tiles = -(-out // rows_tile.columns)
            number = column_tiles // cores
            whole, rest = divmod(rows_tile.columns, rows_tile.body_columns)
            trips = []
            large, small = rows_tile.large, rows_tile.small
            num_large = [(end + small - 1) // large for end, _ in high]
            counts = [sum(num_large)]
            if small < large:
                counts.append(
                    sum(
                        -(-max(end - n * large, 0) // small)
                        for (end, _), n in zip(high, num_large, strict=True)
                    )
                )
            for count in counts:
                trips += [number * count * whole] + ([number * count] if rest else [])
            fetched = sum(-(-end // 16) * 16 for end, _ in high)
            used = sum(n > 0 for n in problem.sizes)
            moved = fetched * contracted * column_tiles + rows * out
            moved += used * contracted * out * problem.num_rhs
    bodies, cycles = sum_cycles(schedule, trips, 1 + (number > 1), number, len(high))
    return Cost(f"{problem.kind}, ours", schedule, bodies, cycles, 2 * moved / cores)


def stored_cost(problem: Problem, chip: str, name: str) -> Cost:
    """Compiles our kernel for weights stored in a format, and sums its cycles and bytes."""
    rows, depth, columns, groups = problem.shape
    form = format_of(name)
    assert form is not None
    arguments = {"kind": problem.kind, "shape": list(problem.shape), "form": name}
    (schedule,) = tpu_schedule.compile_schedules(f"{PROGRAMS}:stored", arguments, chip, "grouped")
    device = jax.sharding.AbstractDevice(DEVICES[chip][0], DEVICES[chip][1], "tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("chip",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        tile = tpu_quantised.choose_tile(rows, groups, (depth, columns), form, problem.num_rhs)
    visits, chunks, start = 0, 0, 0
    for size in filter(None, problem.sizes):
        end = start + size
        for block in range(start // tile.rows, (end - 1) // tile.rows + 1):
            low, high = (max(x - block * tile.rows, 0) for x in (start, end))
            visits += 1
            chunks += -(-(min(high, tile.rows) - (low & -ALIGN)) // tile.chunk)
        start = end
    cores = DEVICES[chip][1]
    number = -(-columns // tile.columns) // cores
    whole, rest = divmod(tile.columns, tile.body_columns)
    trips = [number * chunks * times for times in (whole, int(rest > 0)) if times]
    bodies, cycles = sum_cycles(schedule, trips, 1 + (number > 1), number, visits)
    used = sum(n > 0 for n in problem.sizes)
    numbers = columns * depth * (4 if form.dtype == "int4" else 8) // 8
    scales = 2 * form.num_blocks(depth) * columns
    moved = rows * (depth * number * cores + columns) * 2
    moved += used * problem.num_rhs * (numbers + scales)
    return Cost(f"{problem.kind}, {name}", schedule, bodies, cycles, moved / cores)


def megablox_cost(problem: Problem, chip: str, tiling: tuple[int, int, int]) -> Cost:
    """Compiles megablox with a tiling and sums its cycles and bytes."""
    arguments = {"kind": problem.kind, "shape": list(problem.shape), "tiling": list(tiling)}
    (schedule,) = tpu_schedule.compile_schedules(f"{PROGRAMS}:megablox", arguments, chip)
    rows, _, _, groups = problem.shape
    tile_rows, tile_depth, tile_columns = tiling
    contracted, out = problem.widths
    ends = np.cumsum(problem.sizes)
    starts, filled = ends - problem.sizes, np.asarray(problem.sizes) > 0
    visits_G = np.where(filled, -(-ends // tile_rows) - starts // tile_rows, 0)
    across, depth = -(-out // tile_columns), -(-contracted // tile_depth)
    cores = DEVICES[chip][1]
    share = -(-across // cores) / across  # Cores share the tiles of columns.
    visits = int(visits_G.sum())
    if problem.kind == "weights-backward":
        visits += int((~filled).sum())
        outer = across * depth * groups
        moved = visits * tile_rows * (contracted * across + out * depth) + groups * contracted * out
        # It takes the rows transposed, so XLA transposes them first.
        moved += 2 * rows * contracted
    else:
        outer = across * visits
        again = visits if depth > 1 else int(filled.sum())
        distinct = visits if depth > 1 else -(-rows // tile_rows)
        moved = distinct * tile_rows * contracted * across + again * contracted * out + rows * out
    steps = across * visits * depth
    regions = schedule.matmul_regions()
    if len(regions) == 1:
        trips = [steps]
    else:  # One body for a visit's last step, which also stores, and one for those before.
        first, second = regions
        last = [steps // depth, steps - steps // depth]
        trips = last if first.cycles >= second.cycles else last[::-1]
    whole = tpu_schedule.cost("", schedule, trips, outer, steps)
    label = f"{problem.kind}, megablox {'×'.join(map(str, tiling))}"
    bodies = tuple((region, int(number * share)) for region, number in whole.bodies)
    return Cost(label, schedule, bodies, whole.cycles * share, 2 * moved * share)


def tilings(problem: Problem, heights: list[int], chip: str) -> list[tuple[int, int, int]]:
    """Returns tilings worth trying: whole depth or half of it, as wide as VMEM allows.

    Cores share the columns evenly.
    """
    contracted, out = problem.widths
    cores = DEVICES[chip][1]
    found = []

    def tile(width: int, parts: int) -> int:
        return -(-width // (128 * parts)) * 128

    def fits(height: int, depth: int, columns: int) -> bool:
        # Two buffers of the inputs and the result in bfloat16, and its sums in float32.
        if problem.kind == "weights-backward":
            taken = 4 * height * (depth + columns) + 8 * depth * columns
        else:
            taken = 4 * depth * (height + columns) + 8 * height * columns
        return taken <= MEGABLOX_VMEM[chip]

    for height in heights:
        for depth in (contracted, contracted // 256 * 128):
            widest = (
                n
                for n in range(cores, out // 128 + cores, cores)
                if fits(height, depth, tile(out, n))
            )
            number = next(widest, None)
            if number is not None:
                found.append((height, depth, tile(out, number)))
            if number == cores:  # As wide as can be.
                break
    return found


def compare_stored(problem: Problem, chip: str, names: list[str]) -> None:
    """Prints the rows of a problem: ours in bfloat16, and by stored weights, over its cycles."""
    plain = our_cost(problem, chip)
    print(plain.row(problem, chip, None), flush=True)
    for name in names:
        print(stored_cost(problem, chip, name).row(problem, chip, plain), flush=True)


def compare(problem: Problem, chip: str, heights: list[int], default: bool) -> None:
    """Prints the rows of a problem: ours, and the best of megablox (no SwiGLU there)."""
    kind = "forward" if problem.kind == "swiglu" else problem.kind
    peer = dataclasses.replace(problem, kind=kind)
    sizes = [] if problem.kind == "swiglu" else tilings(peer, heights, chip)
    sizes += [(128, 128, 128)] if default and sizes else []
    found = []
    ours = our_cost(problem, chip)
    for size in sizes:
        try:
            found.append(megablox_cost(peer, chip, size))
        except RuntimeError as error:
            print(f"megablox {size}: {str(error)[-300:]}", file=sys.stderr)
        else:
            cycles = found[-1].cycles / 1e6
            print(f"{chip} {found[-1].label}: {cycles:.2f} M cycles", file=sys.stderr)
    best = min(found, key=lambda cost: cost.cycles, default=None)
    print(ours.row(problem, chip, best), flush=True)
    for cost in found:
        if cost is best or cost.label.endswith("128×128×128"):
            print(cost.row(peer, chip, None), flush=True)


def main() -> None:
    """Parses the command line and prints a table."""
    parser = command_line(__doc__)
    parser.add_argument("--chips", type=names_of(DEVICES), default=",".join(DEVICES))
    parser.add_argument(
        "--shape",
        type=numbers(4),
        default="49152x2048x1408x64",
        help="rows, depth, columns, groups",
    )
    parser.add_argument("--kinds", type=names_of(KINDS), default=",".join(KINDS))
    parser.add_argument(
        "--heights", type=several(positive), default="64,128,256", help="of megablox's tiles"
    )
    parser.add_argument("--stored", nargs="+", choices=STORED, default=[], help="instead of it")
    parser.add_argument("--default", action="store_true", help="megablox's default tiling too")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    shape: Any = tuple(map(int, options.shape.split("x")))
    sizes = np.random.default_rng(0).multinomial(shape[0], np.full(shape[3], 1 / shape[3]))
    heights = [int(height) for height in options.heights.split(",")]
    print(HEADER)
    for chip in options.chips.split(","):
        for kind in options.kinds.split(","):
            problem = Problem(kind, shape, tuple(sizes.tolist()))
            if not options.stored:
                compare(problem, chip, heights, options.default)
            elif kind in ("forward", "swiglu"):
                compare_stored(problem, chip, options.stored)


if __name__ == "__main__":
    with one_line_errors():
        main()
