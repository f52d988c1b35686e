"""Plans the runs of configs/runs and writes their table, docs/plans.md.

    python scripts/plan_runs.py                 # the table anew, of the plans in docs/plans.json
    python scripts/plan_runs.py v2_v5p_64       # compiles these first; minutes each
    python scripts/plan_runs.py --missing       # all that have no plan as they are now
    python scripts/plan_runs.py --missing --count   # counts the bytes of their state alone

A plan is `dsjax plan RUN --topology POD --json`. A run that changed since shows no figures. Plans
of runs on GPUs have no times; they need the extra cuda, the others tpu.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from arguments import command_line, names_of, one_line_errors

from dsjax.config import TrainConfig
from dsjax.config.load import load_train_config

ROOT = Path(__file__).resolve().parent.parent
PLANS, TABLE = ROOT / "docs" / "plans.json", ROOT / "docs" / "plans.md"


class Where(NamedTuple):
    """What a run is planned for: one slice by libtpu's name, or cards; how many there are."""

    topology: str
    number: int = 1
    on_gpu: bool = False


RUNS = {
    "v2_v5p_64": Where("v5p:4x4x4"),
    "v2_v5p_512": Where("v5p:8x8x8"),
    "v2_v6e_256": Where("v6e:16x16"),
    "v2_v6e_2x256": Where("v6e:16x16", 2),
    "v2_tpu7x_64": Where("tpu7x:4x4x4"),
    "v2_pretraining": Where("v5p:8x12x12"),
    "v2_long_context": Where("v5p:8x12x12"),
    "v2_lite_v5p_4": Where("v5p:2x2x1"),
    "v2_lite_128k_v5p_4": Where("v5p:2x2x1"),
    "v2_lite_v5e_16": Where("v5e:4x4"),
    "v2_lite_v6e_8": Where("v6e:2x4"),
    "quickstart": Where("v5e:1x1"),
    "v2_lite_h100_8": Where("H100", 8, on_gpu=True),
    "v2_lite_h100_2": Where("H100", 2, on_gpu=True),
    "v2_lite_h200": Where("H200", on_gpu=True),
    "v2_lite_8_layers_h100": Where("H100", on_gpu=True),
    "v2_lite_finetune_h100": Where("H100", on_gpu=True),
}
# Chips by which the state of so many cards is counted: bytes follow from the mesh alone.
_LIKE = {1: "v5e:1x1", 2: "v5e:1x2", 8: "v5e:2x4"}
_KEPT = (
    *("chips", "mesh", "peak_bytes", "capacity_bytes", "parameter_bytes", "optimizer_bytes"),
    *("flops", "recomputed_flops", "model_flops", "hbm_bytes", "collective_bytes"),
    *("modelled_seconds_serial", "modelled_seconds", "tokens_per_second_per_chip"),
    *("modelled_mfu", "compile_seconds"),
)
_HEAD = (
    *("run", "on", "mesh", "rows x tokens", "peak of capacity, GiB", "state, GiB"),
    *("TFLOP, again", "GB sent", "step, s (nothing hidden)", "tokens/s", "MFU", "compiled, s"),
)


def planned_by(run: TrainConfig) -> dict[str, Any]:
    """Returns what a plan depends on: the fields that are no defaults, so new ones change none."""
    of_step = ("model", "batch", "runtime", "mesh", "optimizer", "loss")
    found = {name: _changed(getattr(run, name)) for name in of_step}
    found["length"] = run.data.length
    return json.loads(json.dumps(found))


def _changed(config: Any) -> Any:
    if not dataclasses.is_dataclass(config):
        return config
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            found[field.name] = _changed(value)
    return found


def plan(name: str, count_only: bool) -> dict[str, Any]:
    """Plans a run in a process of its own, as libtpu wants one, or counts its state.

    Raises:
        RuntimeError: there is no plan; has the line that says why.
    """
    run, where = load_train_config(name, ()), RUNS[name]
    if count_only:
        figures = _count_state(run, where)
    else:
        command = [sys.executable, "-m", "dsjax", "plan", name, "--json", "--topology"]
        if where.on_gpu:
            command += [f"{where.topology.lower()}:{where.number}"]
        else:
            command += [where.topology, "--slices", str(where.number)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode != 0:
            raise RuntimeError(f"{name}: {ended.stderr.strip().splitlines()[-1]}")
        figures = json.loads(ended.stdout)
    return record(run, figures, "jax-cuda13-plugin" if where.on_gpu else "libtpu")


def record(run: TrainConfig, figures: Mapping[str, Any], compiler: str) -> dict[str, Any]:
    """Returns what is kept of a plan, with the version of the compiler's package."""
    return {
        "compiler": f"{compiler} {importlib.metadata.version(compiler)}",
        "of": planned_by(run),
        "figures": {name: figures[name] for name in _KEPT if name in figures},
    }


def _count_state(run: TrainConfig, where: Where) -> dict[str, Any]:
    from dsjax.mesh import make_mesh
    from dsjax.plan import tpu_devices
    from dsjax.plan.state import state_figures, state_kinds

    if where.on_gpu:
        devices = tpu_devices(_LIKE[where.number])
    else:
        devices = tpu_devices(where.topology, where.number)
    mesh = make_mesh(run.mesh, devices)
    held = state_figures(state_kinds(run, mesh))
    return {"chips": len(devices), "mesh": dict(mesh.shape), **held}


def table(plans: Mapping[str, Any]) -> str:
    """Returns docs/plans.md: a row for every run, without figures where none are of it now."""
    lines = [
        "# Plans of the runs",
        "",
        "Written by `scripts/plan_runs.py` from `docs/plans.json`: each TPU row is `dsjax plan RUN "
        "--topology POD --json`, the whole step compiled",
        "for that pod with no TPU here. Figures are of a device, as JAX counts devices (a 7x chip "
        "is two). Times are modelled, never measured: data",
        "sheets' rates and the compiled schedule, no kernel below its peak, so a step can only be "
        "slower. A dash: not compiled as the run is now.",
        "Of runs on GPUs nothing is modelled but memory, of which a process is taken to have 0.95; "
        "what was measured is in",
        "[BENCHMARKS.md](../BENCHMARKS.md). Compile times are wall time on two cores "
        "that other work may have shared.",
        "",
        "| " + " | ".join(_HEAD) + " |",
        "|" + "---|" * len(_HEAD),
    ]
    for name in RUNS:
        run = load_train_config(name, ())
        kept = plans.get(name)
        figures = kept["figures"] if kept and kept["of"] == planned_by(run) else {}
        lines.append("| " + " | ".join(_row(name, run, figures)) + " |")
    compilers = sorted({kept["compiler"] for kept in plans.values()})
    lines += ["", f"Compiled by {', '.join(compilers)}." if compilers else "", ""]
    return "\n".join(lines)


def _row(name: str, run: TrainConfig, figures: Mapping[str, Any]) -> list[str]:
    where = RUNS[name]
    several = f"{where.number} x " if where.number > 1 else ""
    slices = f", {run.batch.accumulate} slices" if run.batch.accumulate > 1 else ""
    row = [
        f"`{name}`",
        f"{several}{where.topology}",
        ", ".join(f"{axis} {size}" for axis, size in figures.get("mesh", {}).items() if size > 1),
        f"{run.batch.size:,} x {run.data.length:,}{slices}",
    ]

    def gib(*names: str) -> str:
        return f"{sum(figures[name] for name in names) / 2**30:.1f}"

    kept = gib("parameter_bytes", "optimizer_bytes") if figures else "–"
    if "peak_bytes" not in figures:
        return [row[0], row[1], row[2] or "–", row[3], "–", kept, *["–"] * 6]
    compiled = [
        *(row[0], row[1], row[2] or "one device", row[3]),
        f"{gib('peak_bytes')} of {gib('capacity_bytes')}",
        kept,
    ]
    sent, seconds = f"{figures['collective_bytes'] / 1e9:.1f}", f"{figures['compile_seconds']:.0f}"
    if "modelled_seconds" not in figures:
        return [*compiled, "–", sent, "–", "–", "–", seconds]
    taken, alone = figures["modelled_seconds"], figures["modelled_seconds_serial"]
    return [
        *compiled,
        f"{figures['flops'] / 1e12:,.3g}, {figures['recomputed_flops'] / 1e12:,.3g}",
        sent,
        f"{taken:.3g} ({alone:.3g})",
        f"{figures['tokens_per_second_per_chip']:,.0f}",
        f"{figures['modelled_mfu']:.1%}",
        seconds,
    ]


def main() -> None:
    """Plans what is asked for and writes the table."""
    parser = command_line(__doc__)
    parser.add_argument("runs", metavar="RUN", nargs="*", type=names_of(RUNS), help="to compile")
    parser.add_argument("--missing", action="store_true", help="compile all that have no plan")
    parser.add_argument("--count", action="store_true", help="compile nothing: count the state")
    arguments = parser.parse_args()
    with one_line_errors():
        plans = json.loads(PLANS.read_text(encoding="utf-8")) if PLANS.exists() else {}
        now = {name: planned_by(load_train_config(name, ())) for name in RUNS}
        wanted = [name for given in arguments.runs for name in given.split(",")]
        if arguments.missing:
            wanted += [
                name
                for name in RUNS
                if not _is_planned(plans.get(name), now[name], counted=arguments.count)
            ]
        for name in dict.fromkeys(wanted):
            if arguments.count and _is_planned(plans.get(name), now[name], counted=True):
                continue  # to compile it took minutes
            plans[name] = plan(name, arguments.count)
            _write(plans)  # what is finished is kept
        _write(plans)


def _is_planned(kept: Mapping[str, Any] | None, now: Mapping[str, Any], counted: bool) -> bool:
    """Whether a run has a plan as it is now; `counted`: its state, counted, is enough of one."""
    if kept is None or kept["of"] != now:
        return False
    return counted or "peak_bytes" in kept["figures"]


def _write(plans: Mapping[str, Any]) -> None:
    ordered = {name: plans[name] for name in RUNS if name in plans}
    PLANS.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
    TABLE.write_text(table(ordered), encoding="utf-8")


if __name__ == "__main__":
    main()
