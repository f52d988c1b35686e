"""Reads from the TPU compiler how long a Pallas kernel computes, on a host without a TPU.

A TPU core issues statically. So the cycles of a kernel's final schedule, times how often each part
runs, are its compute time. libtpu compiles for a chip that is not there and dumps that schedule,
with the units that each cycle uses. This script compiles in a subprocess, reads the dump and prints
tables. The figures leave out the wait for memory; `decode` prints the bytes that the kernel reads
beside the fewest it could.

    python scripts/tpu_schedule.py attention --chips v5e,v5p,v6e,tpu7x --heads 16 --tokens 4096
    python scripts/tpu_schedule.py decode --chips v6e --heads 128 --batch 128 --tokens 8192
    python scripts/tpu_schedule.py kernel scripts/tpu_programs.py:attention_forward '{"heads": 16}'

For kernels of one's own: `compile_schedules("module:function", {...}, chip)`, where the function
returns a jittable function and its abstract arguments.
"""

import dataclasses
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from arguments import command_line, names_of, numbers, one_line_errors, positive, several

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = str(ROOT / "scripts" / "tpu_programs.py")
SPLASH_MODES = ("fused", "separate")  # its two backward passes
DECODE_DTYPES = ("bfloat16", "int8", "float8_e4m3fn")  # of the pages
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
# HBM bytes per second and clock of a core, from the vendor's specifications and the compiler's own
# cost model; only `decode` uses them, to set cycles beside bytes.
BYTES_PER_CYCLE = {"v5e": 546, "v5p": 790, "v6e": 937, "tpu7x": 1680}


@dataclasses.dataclass(frozen=True)
class Region:
    """A stretch of code without branches.

    Attributes:
        start: its first cycle in the listing.
        cycles: its length, stalls that the compiler foresees included.
        used: slots used over the region, by unit.
        capacity: slots per cycle, by unit.
        depth: how many loops it lies in, the grid's included.
    """

    start: int
    cycles: int
    used: dict[str, int]
    capacity: dict[str, int]
    depth: int

    def share(self, unit: str) -> float:
        """Returns the used share of a unit's slots."""
        return self.used[unit] / (self.cycles * self.capacity[unit])


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A compiled kernel: its regions in program order and the VMEM it allocates."""

    name: str
    regions: tuple[Region, ...]
    vmem_bytes: int

    def matmul_regions(self) -> list[Region]:
        """Returns the regions that use the MXU, the one that uses it most first."""
        found = [region for region in self.regions if region.used["MXU"]]
        return sorted(found, key=lambda region: -region.used["MXU"])


def compile_schedules(
    target: str, arguments: dict[str, Any], chip: str, kernel: str = ""
) -> list[Schedule]:
    """Compiles for a chip in a subprocess and returns the schedules of its kernels.

    Args:
        target: "module:function" or "file.py:function"; called with `arguments`, it returns a
            function and its abstract arguments.
        arguments: JSON-compatible keyword arguments of the target.
        chip: a key of `TOPOLOGIES`.
        kernel: a part of the wanted kernels' names.

    Returns:
        One schedule per Pallas kernel, in the order of their names.

    Raises:
        RuntimeError: the compilation failed; the message ends with the compiler's.
    """
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "LIBTPU_INIT_ARGS": flags}
        command = [sys.executable, __file__, "child", target, json.dumps(arguments), chip]
        result = subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
        )
        if result.returncode:
            raise RuntimeError(f"{target} {arguments} on {chip}: {result.stderr[-2000:]}")
        names = set(json.loads(result.stdout.splitlines()[-1]))
        wanted = sorted(name for name in names if kernel in name)
        return [read_schedule(Path(folder), name) for name in wanted]


def read_schedule(folder: Path, name: str) -> Schedule:
    """Reads a kernel's dump.

    In the schedule before the "delay converter" a bundle is a cycle. After it, runs of empty
    bundles are folded into the one before them.
    """

    def dump(pattern: str) -> Path:
        return max(folder.glob(f"*-{name}-*{pattern}.txt"), key=lambda path: path.name)

    units, capacity, *rows = (
        line
        for line in dump("pre-delay_hlo-static-per-bundle-utilization").read_text().splitlines()
        if line.strip() and not line.startswith("==")
    )
    names = [unit.strip() for unit in units.split(",")]
    slots = dict(zip(names, map(int, capacity.split()), strict=True))
    used = [[int(x) for x in row.split()] for row in rows]

    borders = {0, len(used)}
    depths = {0: 0}
    for line in dump("[0-9]-packed-bundles-post-ra").read_text().splitlines():
        match = re.match(r"\s*(0x[0-9a-f]+|0)\s+((?:[A-Z]{2}\s*)*):\s*(>*)", line)
        if match is None:
            continue
        address = int(match[1], 16)
        depths[address] = len(match[3])
        if match[2].strip():  # A loop's or a predicated region's first bundle.
            borders.add(address)
        if "sbr.rel" in line:
            borders.add(address + 1)
    regions = []
    edges = sorted(border for border in borders if border <= len(used))
    for start, end in itertools.pairwise(edges):
        sums = [sum(column) for column in zip(*used[start:end], strict=True)]
        units_used = dict(zip(names, sums, strict=True))
        # The listing gives no depth to empty bundles, which may begin a region.
        depth = max((depths.get(address, 0) for address in range(start, end)), default=0)
        regions.append(Region(start, end - start, units_used, slots, depth))

    text = dump("[0-9]-post-bundle-packing-post-ra").read_text()
    sizes = {
        match[1]: int(match[2], 16)
        for match in re.finditer(r"#(allocation\w+) \[[^\n]*space=vmem, size = (0x\w+)", text)
    }
    return Schedule(name, tuple(regions), sum(sizes.values()))


def _child(target: str, arguments: str, chip: str) -> None:
    """Compiles in this process and prints the names of the kernels as JSON."""
    import jax

    from dsjax.plan import tpu_devices

    devices = tpu_devices(TOPOLOGIES[chip])
    path, function = target.rsplit(":", 1)
    if path.endswith(".py"):
        sys.path.insert(0, str(Path(path).resolve().parent))
        path = Path(path).stem
    fn, args = getattr(importlib.import_module(path), function)(**json.loads(arguments))
    sharding = jax.sharding.SingleDeviceSharding(devices[0])
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
    # Kernels ask the mesh in use for the chip.
    mesh = jax.sharding.Mesh(devices[:1], ("chip",)).abstract_mesh
    with jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(fn).trace(*args).lower().compile().as_text()
    calls = re.findall(r"%?([\w.\-]+) = [^\n]*custom_call_target=\"tpu_custom_call\"", text)
    print(json.dumps(calls))


# ---- attention beside jax's splash attention


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a kernel costs over its whole grid."""

    label: str
    schedule: Schedule
    bodies: tuple[tuple[Region, int], ...]  # Matmul regions with their trips.
    cycles: int

    @property
    def mxu_cycles(self) -> float:
        """Cycles that the used MXU slots would take with all MXUs of the core busy."""
        return sum(
            region.used["MXU"] * trips / region.capacity["MXU"] for region, trips in self.bodies
        )

    def row(self) -> str:
        """Returns a Markdown table row."""
        inner, _ = self.bodies[0]
        loops = " + ".join(f"{region.cycles:,} × {trips:,}" for region, trips in self.bodies)
        spills = f"{inner.used['VSTORE:SPILL']:,} / {inner.used['VLOAD:FILL']:,}"
        slots = inner.cycles * inner.capacity["MXU"]
        return (
            f"| {self.label} | {loops} | {inner.used['MXU']:,} / {slots:,} = "
            f"{inner.share('MXU'):.0%} | {self.mxu_cycles / 1e6:.3f} | {self.cycles / 1e6:.3f} | "
            f"{spills} | {self.schedule.vmem_bytes / 2**20:.1f} |"
        )


HEADER = (
    "| kernel | inner loop: cycles × trips | MXU slots used / available there | MXU cycles, M | "
    "cycles, M | spills: stores / loads | VMEM, MiB |\n|---|---|---|---|---|---|---|"
)


def cost(label: str, schedule: Schedule, trips: list[int], outer: int, steps: int) -> Cost:
    """Sums a kernel's regions over its grid.

    Args:
        label: the row's name.
        schedule: the compiled kernel.
        trips: how often each matmul region runs, the largest region first.
        outer: how often the vector unit's own regions run (starts and ends of the outer loop).
        steps: grid steps; small regions and scalar ones (the grid's bookkeeping) run in each.
    """
    bodies = tuple(zip(schedule.matmul_regions(), trips, strict=True))
    matmuls = {region.start for region, _ in bodies}
    cycles = sum(region.cycles * trips for region, trips in bodies)
    for region in schedule.regions:
        if region.start not in matmuls:
            vector = region.cycles > 100 and region.used["VALU"] + region.used["VSTORE"] > 50
            cycles += region.cycles * (outer if vector else steps)
    return Cost(label, schedule, bodies, cycles)


def attention_costs(
    chip: str, heads: int, tokens: int, splash_blocks: list[Any], splash_modes: list[str]
) -> Iterator[Cost]:
    """Yields the costs of both implementations on a chip; splash's with its best block sizes."""
    from pallas_kernels.mla_attention import tiles

    here = PROGRAMS
    shape = {"heads": heads, "tokens": tokens}
    forward, backward = tiles.TPU_FORWARD, tiles.TPU_BACKWARD
    if chip in ("v5e", "v5p"):
        forward, backward = tiles.TPU_FORWARD_NARROW, tiles.TPU_BACKWARD_NARROW
    for label, name, tile in (
        ("mla_attention forward", "attention_forward", forward),
        ("mla_attention backward", "attention_backward", backward),
    ):
        (schedule,) = compile_schedules(f"{here}:{name}", shape, chip, "mla_attention")
        # Two heads a step; code for whole parts and for those on the diagonal.
        pairs, rows, parts = heads // 2, -(-tokens // tile.block), -(-tokens // tile.part)
        full = parts * (parts - 1) // 2
        trips = [pairs * full, pairs * parts] if full else [pairs * parts]
        if tile.lag:  # What is held last is finished once per block of queries.
            trips.append(pairs * rows)
        steps = pairs * rows * (rows + 1) // 2
        yield cost(label, schedule, trips, pairs * rows, steps)

    def splash_cost(blocks: Any, grad: str) -> list[Cost]:
        arguments = shape | {"blocks": blocks, "grad": grad}
        schedules = compile_schedules(f"{here}:splash", arguments, chip, "splash")
        q, k = (-(-tokens // blocks[n]) for n in range(2))
        visible = sum(1 for i in range(q) for j in range(k) if j * blocks[1] < (i + 1) * blocks[0])
        found = []
        for schedule in schedules:
            if bool(grad) == ("fwd" in schedule.name):
                continue
            which = re.sub(r"\.\d+$", "", schedule.name).removeprefix("splash_mha_")
            label = f"splash {which} {'×'.join(map(str, blocks))} {grad}".strip()
            outer = heads * (k if "dkv" in which else q)
            found.append(cost(label, schedule, [heads * visible], outer, heads * q * k))
        return found

    for modes in ([""], splash_modes):
        candidates = []
        for mode in modes:
            for blocks in splash_blocks:
                try:
                    candidates.append(splash_cost(blocks, mode))
                except RuntimeError as error:
                    print(f"splash {blocks} {mode}: {str(error)[-200:]}", file=sys.stderr)
        if candidates:
            yield from min(candidates, key=lambda found: sum(c.cycles for c in found))


# ---- decode


def decode_row(
    chip: str, heads: int, query_tokens: int, batch: int, tokens: int, dtype: str
) -> str:
    """Compiles decode for a chip and returns a table row: cycles of a block beside its bytes."""
    from pallas_kernels.mla_decode import tiles

    arguments = {
        "heads": heads,
        "query_tokens": query_tokens,
        "batch": batch,
        "tokens": tokens,
        "dtype": dtype,
    }
    (schedule,) = compile_schedules(f"{PROGRAMS}:decode", arguments, chip, "mla_decode")
    # Two bodies: for whole blocks and, with the mask and so longer, for a sequence's last one.
    body = min(schedule.matmul_regions(), key=lambda region: region.cycles)
    itemsize = 1 if dtype in ("int8", "float8_e4m3fn") else 2
    scale = 4 if itemsize == 1 else 0
    least, moved = 512 * itemsize + 64 * 2 + scale, 512 * itemsize + 128 * 2 + scale
    block = tiles.TPU.block_tokens
    memory = block * moved / BYTES_PER_CYCLE[chip]
    return (
        f"| {chip} | {batch} × {tokens:,}, {heads} heads, {query_tokens} tokens, {dtype} | "
        f"{body.cycles:,} | {body.share('MXU'):.0%} | {memory:,.0f} | {moved:,} | {least:,} | "
        f"{moved / least:.2f} | {schedule.vmem_bytes / 2**20:.1f} |"
    )


DECODE_HEADER = (
    "| chip | shape | cycles to compute a block of tokens | MXU slots used there "
    "| cycles to read it | bytes moved per token | least | ratio | VMEM, MiB |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    """Parses the command line and prints tables."""
    parser = command_line(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    attention = commands.add_parser("attention", help="beside jax's splash attention")
    attention.add_argument("--heads", type=positive, default=16)
    attention.add_argument("--tokens", type=positive, default=4096)
    attention.add_argument(
        "--splash-blocks", type=several(numbers(3)), default="1024x1024x512,512x512x512"
    )
    attention.add_argument(
        "--splash-modes", type=names_of(SPLASH_MODES), default=",".join(SPLASH_MODES)
    )
    decode = commands.add_parser("decode", help="cycles and bytes of absorbed decode")
    decode.add_argument("--heads", type=positive, default=16)
    decode.add_argument("--query-tokens", type=positive, default=1)
    decode.add_argument("--batch", type=positive, default=128)
    decode.add_argument("--tokens", type=positive, default=4096)
    decode.add_argument("--dtype", choices=DECODE_DTYPES, default="bfloat16")
    kernel = commands.add_parser("kernel", help="any kernel's regions")
    kernel.add_argument("target")
    kernel.add_argument("arguments", nargs="?", default="{}")
    for command in (attention, decode, kernel):
        command.add_argument("--chips", type=names_of(TOPOLOGIES), default=",".join(TOPOLOGIES))
    child = commands.add_parser("child")
    for name in ("target", "arguments", "chip"):
        child.add_argument(name)
    options = parser.parse_args()
    if options.command == "child":
        _child(options.target, options.arguments, options.chip)
        return
    sys.path.insert(0, str(ROOT))
    if options.command == "decode":
        print(DECODE_HEADER)
    for chip in options.chips.split(","):
        if options.command == "attention":
            blocks = [[int(n) for n in b.split("x")] for b in options.splash_blocks.split(",")]
            print(
                f"\n{chip}, {options.heads} heads × {options.tokens:,} tokens, causal\n\n{HEADER}"
            )
            shape = (options.heads, options.tokens, blocks, options.splash_modes.split(","))
            for found in attention_costs(chip, *shape):
                print(found.row(), flush=True)
        elif options.command == "decode":
            sizes = (options.heads, options.query_tokens, options.batch, options.tokens)
            print(decode_row(chip, *sizes, options.dtype), flush=True)
        else:
            for schedule in compile_schedules(options.target, json.loads(options.arguments), chip):
                print(f"\n{chip}, {schedule.name}: VMEM {schedule.vmem_bytes / 2**20:.1f} MiB")
                for region in schedule.regions:
                    if region.cycles > 100:
                        shares = ", ".join(f"{u} {region.share(u):.0%}" for u in region.used)
                        print(f"  at {region.start:#x}: {region.cycles:,} cycles; {shares}")


if __name__ == "__main__":
    with one_line_errors():
        main()
