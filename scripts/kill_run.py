"""Trains a run twice, once killed at random times, and compares what both came to.

    python scripts/kill_run.py RUN FOLDER [FIELD=VALUE ...] --kills 40 --picture kills.png

Each kill is a SIGKILL after a random time, by turns of a process that steps and of one that has
just begun, so they meet starts, compiling, steps and saves alike; then the same command goes on. At
the end the losses of all steps and the last checkpoint, parameters and the optimizer's state, must
be the same bit by bit.

FOLDER gets the runs `whole` and `killed`. What is there already goes on.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from arguments import command_line, one_line_errors, png, positive, real

from dsjax.config.run_file import METRICS_FILE
from dsjax.training.picture import read_metrics
from dsjax.weights.param_store import ITEM, OPTIMIZER, ParamStore
from dsjax.weights.run_steps import STEPS_FOLDER, steps_of


class Kill(NamedTuple):
    """One kill: the last step whose figures were there, and whether a save was being written."""

    step: int
    in_save: bool


def train(run: str, folder: Path, overrides: Sequence[str]) -> subprocess.Popen[str]:
    """Starts a run, or goes on with it, in a process of its own."""
    command = [sys.executable, "-m", "dsjax", "train", run, *overrides, f"directory={folder}"]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ
    )


def finish(process: subprocess.Popen[str]) -> None:
    """Waits for the end.

    Raises:
        RuntimeError: the run ended by itself, with a fault.
    """
    _, said = process.communicate()
    if process.returncode != 0:
        raise RuntimeError(f"a run failed: {said.strip().splitlines()[-1]}")


def kill_at_random(
    run: str, folder: Path, overrides: Sequence[str], kills: int, seconds: float, seed: int
) -> list[Kill]:
    """Trains to the end through so many kills, fewer where the run ends before.

    Args:
        run: its name or file.
        folder: where it goes.
        overrides: of its fields.
        kills: how many.
        seconds: the longest time to a kill, from a process's first step or from its start.
        seed: of the times.
    """
    drawn = random.Random(seed)
    found: list[Kill] = []
    while len(found) < kills:
        began, process = time.time(), train(run, folder, overrides)
        if len(found) % 2 == 0:
            wait_for_a_step(process, folder)
        try:
            process.wait(drawn.uniform(0, seconds))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGSTOP)  # nothing changes while we look
            unfinished = [
                path  # not what the kill before left
                for path in (folder / STEPS_FOLDER).glob("*.orbax-checkpoint-tmp*")
                if path.stat().st_mtime >= began
            ]
            step = max((row["step"] for row in read_metrics(folder)), default=0)
            process.kill()
            process.communicate()
            found.append(Kill(step, bool(unfinished)))
            print(f"kill {len(found)} of {kills}: {found[-1]}", flush=True)
            continue
        finish(process)
        return found
    finish(train(run, folder, overrides))
    return found


def wait_for_a_step(process: subprocess.Popen[str], folder: Path) -> None:
    """Waits until a run has written the figures of a step, or has ended."""
    metrics, size = folder / METRICS_FILE, sys.maxsize
    while process.poll() is None:
        last, size = size, metrics.stat().st_size if metrics.exists() else 0
        if size > last:  # a start only cuts it
            return
        time.sleep(0.02)


def losses(folder: Path) -> dict[int, float]:
    """Returns the loss of each step that has figures."""
    return {row["step"]: row["loss"] for row in read_metrics(folder) if "loss" in row}


def last_state(folder: Path) -> dict[str, np.ndarray]:
    """Returns all arrays of the newest checkpoint."""
    found: dict[str, np.ndarray] = {}
    for item in (ITEM, OPTIMIZER):
        store = ParamStore.open(steps_of(folder)[-1], allow_nonfinite=True, item=item)
        for path in store.arrays:
            whole = tuple(slice(None) for _ in store.shape(path))
            found[".".join((item, *path))] = store.read(path, whole)
    return found


def first_difference(whole: Path, killed: Path) -> str:
    """Says what differs first between two runs, a loss or an array's bits; "" for nothing."""
    one, other = losses(whole), losses(killed)
    for step in sorted(one.keys() | other.keys()):
        if one.get(step) != other.get(step):
            return f"step {step}: loss {one.get(step)}, killed {other.get(step)}"
    arrays, others = last_state(whole), last_state(killed)
    for name in sorted(arrays.keys() | others.keys()):
        if name not in arrays or name not in others:
            return f"{name}: is in one of the last checkpoints alone"
        if arrays[name].tobytes() != others[name].tobytes():
            return f"{name}: is not the same in the last checkpoints"
    return ""


def draw(whole: Path, killed: Path, kills: Sequence[Kill], output: Path) -> None:
    """Draws both losses over each other, and where the kills were."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes: Any = figure.subplots()
    for folder, style, name in ((whole, "C0-", "never killed"), (killed, "C1:", "killed")):
        axes.plot(*zip(*sorted(losses(folder).items()), strict=True), style, label=name)
    low = min(losses(whole).values())
    for in_save, color, name in ((False, "gray", "kills"), (True, "C3", "kills in a save")):
        steps = [kill.step for kill in kills if kill.in_save == in_save]
        label = f"{len(steps)} {name}"
        axes.plot(steps, [low] * len(steps), "|", color=color, markersize=14, label=label)
    axes.set(xlabel="step", ylabel="loss", title="Two runs, equal bit by bit")
    axes.grid(alpha=0.2)
    axes.legend()
    figure.savefig(output, dpi=110)


def main() -> None:
    """Reads the arguments, trains both runs and compares."""
    parser = command_line(__doc__)
    parser.add_argument("config", metavar="RUN", help="a run's name or its file")
    parser.add_argument("output", metavar="FOLDER", type=Path, help="gets both runs")
    parser.add_argument("set", metavar="FIELD=VALUE", nargs="*", help="of the run's fields")
    parser.add_argument("--kills", type=positive, default=40)
    parser.add_argument("--seconds", type=real, default=20.0, help="the longest time to a kill")
    parser.add_argument("--seed", type=positive, default=1, help="of the times")
    parser.add_argument("--picture", type=png, help="a PNG")
    arguments = parser.parse_args()
    with one_line_errors():
        whole, killed = arguments.output / "whole", arguments.output / "killed"
        began = time.monotonic()
        finish(train(arguments.config, whole, arguments.set))
        alone = time.monotonic() - began
        kills = kill_at_random(
            *(arguments.config, killed, arguments.set),
            *(arguments.kills, arguments.seconds, arguments.seed),
        )
        if difference := first_difference(whole, killed):
            raise RuntimeError(difference)
        if arguments.picture is not None:
            draw(whole, killed, kills, arguments.picture)
        found = {
            "steps": len(losses(whole)),
            "kills": len(kills),
            "in_save": sum(kill.in_save for kill in kills),
            "arrays": len(last_state(whole)),
            "seconds_whole": round(alone, 1),
        }
        print(json.dumps(found))


if __name__ == "__main__":
    main()
