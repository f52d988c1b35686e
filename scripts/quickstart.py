"""The quickstart's steps: data, training with a stop, export, text.

Everything goes through what a user has: the `dsjax` command line, and Python for the rest.
"""

from __future__ import annotations

import argparse
import json
import logging
import lzma
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dsjax.config.load import load_train_config
from dsjax.data.prepare import HELD_OUT, TRAIN, prepare_data

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RUN = "quickstart"
PROMPT = "    def __init__(self, "
MARKER = ".dsjax_quickstart"  # says that the quickstart made a folder
_MADE = ("run", "corpus", "corpus.partial", "tokenizer", "packed", "hf", "curve.png")


def main() -> None:
    """Runs the steps one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("quickstart_output/script"))
    parser.add_argument("--steps", type=int, default=500, help="optimiser steps")
    parser.add_argument("--corpus-bytes", type=int, default=0, help="use only so much; 0 for all")
    arguments = parser.parse_args()
    output: Path = arguments.output
    for option, least in (("steps", 1), ("corpus_bytes", 0)):  # before anything is cleared
        if getattr(arguments, option) < least:
            parser.error(f"--{option.replace('_', '-')}: must be at least {least}")
    try:
        start_afresh(output)
    except (ValueError, OSError) as error:
        parser.error(f"--output: {error}")
    began = time.perf_counter()
    logging.basicConfig(level=logging.INFO, format="   %(message)s", stream=sys.stdout)

    overrides = [
        *in_folder(output),
        f"num_steps={arguments.steps}",
        f"data.prepare.max_bytes={arguments.corpus_bytes}",
    ]
    run, corpus = output / "run", output / "corpus"
    say("1. corpus, tokenizer, packed rows")
    prepare_data(load_train_config(RUN, overrides).data)
    for part in (TRAIN, HELD_OUT):
        sizes = [path.stat().st_size for path in (corpus / part).rglob("*.py")]
        print(f"   {part}: {len(sizes)} files, {sum(sizes):,} bytes")
    say(f"2. training, until a SIGTERM at step {arguments.steps // 3}")
    train_and_stop(overrides, run, arguments.steps // 3)
    say("3. training again: it goes on where it stopped")
    dsjax("train", RUN, *overrides)
    say("4. bits per byte of all held-out files")
    report(run, output / "curve.png", corpus / HELD_OUT)
    say("5. conversion to Hugging Face")
    dsjax("convert", run, output / "hf")
    say("6. text from the Hugging Face checkpoint")
    dsjax(
        *("generate", output / "hf", "--prompt", PROMPT, "--dtype", "float32"),
        *("--max-tokens", 120, "--temperature", 0.7, "--top-p", 0.95, "--seed", 1),
    )
    print(f"\ndone in {time.perf_counter() - began:.0f} s; everything is in {output}/")


def start_afresh(output: Path) -> None:
    """Makes a folder for the quickstart, or removes from one of its own what it made there.

    Args:
        output: the folder; other files that lie in it stay.

    Raises:
        ValueError: it holds something and the quickstart did not make it, or it is no folder.
    """
    marker = output / MARKER
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file, not a folder")
    if output.is_dir() and any(output.iterdir()) and not marker.is_file():
        raise ValueError(
            f"{output} holds files and was not made by the quickstart: name a new or empty folder"
        )
    output.mkdir(parents=True, exist_ok=True)
    marker.write_text("The quickstart made this folder and may remove what it wrote here.\n")
    for path in (output / name for name in _MADE):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def in_folder(output: Path) -> list[str]:
    """Returns the overrides that put all of the run's files into a folder."""
    return [
        f"directory={output}/run",
        f"data.prepare.folder={output}/corpus",
        f"data.tokenizer={output}/tokenizer",
        f"data.sources.0.path={output}/packed/{TRAIN}",
        f"data.eval_sources.0.path={output}/packed/{HELD_OUT}",
    ]


def say(text: str) -> None:
    """Prints a step's heading."""
    print(f"\n== {text}", flush=True)


def dsjax(*arguments: object) -> None:
    """Runs a dsjax command and stops where it fails."""
    subprocess.run([sys.executable, "-m", "dsjax", *map(str, arguments)], check=True)


def train_and_stop(overrides: list[str], run: Path, step: int) -> None:
    """Trains in another process, and ends it as a cluster would when it has done a step."""
    process = subprocess.Popen([sys.executable, "-m", "dsjax", "train", RUN, *overrides])
    while process.poll() is None and not any(row["step"] >= step for row in read_metrics(run)):
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    if process.wait() != 0:
        sys.exit(f"training ended with exit code {process.returncode}")


def read_metrics(run: Path) -> list[dict[str, float]]:
    """Reads the figures that training has written so far."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    # The last line may still be being written.
    whole = path.read_text().rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


def report(run: Path, picture: Path, held_out: Path) -> None:
    """Prints held-out bits per byte beside what xz reaches on the same files, and plots both."""
    import matplotlib

    matplotlib.use("Agg")

    rows = read_metrics(run)
    xz = xz_bits_per_byte(held_out)
    for row in rows:
        if "eval_bits_per_byte" in row:
            print(f"   step {row['step']:5}: {row['eval_bits_per_byte']:.3f}")
    print(f"   xz -9 on the same files: {xz:.3f}")
    plot_curves(rows, xz).savefig(picture, dpi=120)
    print(f"   plotted in {picture}")


def xz_bits_per_byte(folder: Path) -> float:
    """Returns bits per byte that xz -9 takes for the files that held-out rows come from."""
    joined = b"".join(path.read_bytes() for path in sorted(folder.rglob("*.py")))
    return 8 * len(lzma.compress(joined, preset=9)) / len(joined)


def plot_curves(rows: list[dict[str, float]], xz: float) -> Figure:
    """Plots a run's training loss and its held-out bits per byte.

    Args:
        rows: the lines of `metrics.jsonl`; all evaluations must be of the same rows.
        xz: bits per byte of xz on the text of those rows.

    Returns:
        The figure: each step's loss in light and its smoothed course, and the evaluations.
    """
    import matplotlib.pyplot as plt

    trained = [(r["step"], r["cross_entropy"]) for r in rows if "cross_entropy" in r]
    evaluated = [(r["step"], r["eval_bits_per_byte"]) for r in rows if "eval_bits_per_byte" in r]
    steps, losses = zip(*trained, strict=True)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.plot(steps, losses, color="C0", alpha=0.25, label="single steps")
    left.plot(steps, smoothed(losses), color="C0", label="smoothed")
    left.set(title="Training", xlabel="step", ylabel="cross entropy (nats per token)")
    left.legend()
    right.plot(*zip(*evaluated, strict=True), color="C1", marker="o", label="model")
    right.axhline(xz, color="gray", linestyle="--", label="xz -9")
    right.set(title="All held-out files", xlabel="step", ylabel="bits per byte")
    right.set_xlim(left=0)
    right.set_ylim(0, 1.1 * max(xz, *(value for _, value in evaluated)))
    right.legend()
    return figure


def smoothed(values: Sequence[float], width: int = 5) -> list[float]:
    """Returns means of neighbours, weighted by a bell `width` values wide that lags on no side."""
    distance = np.arange(-3 * width, 3 * width + 1)
    bell = np.exp(-0.5 * (distance / width) ** 2)
    total, weight = (np.convolve(v, bell) for v in (values, np.ones(len(values))))
    inside = slice(3 * width, 3 * width + len(values))  # at the ends of fewer neighbours
    return (total[inside] / weight[inside]).tolist()


if __name__ == "__main__":
    main()
