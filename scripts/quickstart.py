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
from pathlib import Path

from dsjax.config.load import load_train_config
from dsjax.data.prepare import HELD_OUT, TRAIN, prepare_data

RUN = "quickstart"
PROMPT = "    def __init__(self, "


def main() -> None:
    """Runs the steps one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("quickstart_output"))
    parser.add_argument("--steps", type=int, default=500, help="optimiser steps")
    parser.add_argument("--corpus-bytes", type=int, default=0, help="use only so much; 0 for all")
    arguments = parser.parse_args()
    output: Path = arguments.output
    if output.exists():
        shutil.rmtree(output)
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
    say("4. held-out bits per byte, of all held-out files")
    dsjax("train", RUN, *overrides, "log.eval_rows=0")
    report(run, output / "curve.png", corpus / HELD_OUT)
    say("5. conversion to Hugging Face")
    dsjax("convert", run, output / "hf")
    say("6. text from the Hugging Face checkpoint")
    dsjax(
        *("generate", output / "hf", "--prompt", PROMPT, "--dtype", "float32"),
        *("--max-tokens", 120, "--temperature", 0.7, "--top-p", 0.95, "--seed", 1),
    )
    print(f"\ndone in {time.perf_counter() - began:.0f} s; everything is in {output}/")


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
    import matplotlib.pyplot as plt

    joined = b"".join(path.read_bytes() for path in sorted(held_out.rglob("*.py")))
    xz = 8 * len(lzma.compress(joined, preset=9)) / len(joined)
    rows = read_metrics(run)
    evaluated = [(r["step"], r["eval_bits_per_byte"]) for r in rows if "eval_bits_per_byte" in r]
    for step, value in evaluated[:-1]:
        print(f"   step {step:5}: {value:.3f} bits per byte of the first rows")
    print(f"   at the end: {evaluated[-1][1]:.3f} bits per byte of all files")
    print(f"   xz -9 on the same files: {xz:.3f}")
    trained = [(r["step"], r["cross_entropy"]) for r in rows if "cross_entropy" in r]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.plot(*zip(*trained, strict=True))
    left.set(title="training", xlabel="step", ylabel="cross entropy (nats per token)")
    right.plot(*zip(*evaluated, strict=True), marker="o", label="held-out")
    right.axhline(xz, color="gray", linestyle="--", label="xz -9")
    right.set(title="held-out files", xlabel="step", ylabel="bits per byte")
    right.legend()
    figure.savefig(picture, dpi=120)
    print(f"   plotted in {picture}")


if __name__ == "__main__":
    main()
