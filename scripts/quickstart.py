"""The quickstart's steps: data, training with a stop, export, text.

Everything goes through what a user has: the `dsjax` command line, and Python for the rest.
"""

from __future__ import annotations

import logging
import lzma
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from arguments import command_line, not_negative, positive

from dsjax.config.load import load_train_config
from dsjax.data.prepare import HELD_OUT, TRAIN, prepare_data
from dsjax.training.picture import draw_held_out, draw_loss, read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RUN = "quickstart"
PROMPT = "    def __init__(self, "
MARKER = ".dsjax_quickstart"  # says that the quickstart made a folder
_MADE = ("run", "corpus", "corpus.partial", "tokenizer", "packed", "hf", "curve.png")


def main() -> None:
    """Runs the steps one after the other."""
    parser = command_line(__doc__)
    parser.add_argument("--output", type=Path, default=Path("quickstart_output/script"))
    parser.add_argument("--steps", type=positive, default=500, help="optimiser steps")
    parser.add_argument(
        "--corpus-bytes", type=not_negative, default=0, help="use only so much; 0 for all"
    )
    arguments = parser.parse_args()
    output: Path = arguments.output
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

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    draw_loss(left, rows)
    draw_held_out(right, rows, "All held-out files")
    right.axhline(xz, color="gray", linestyle="--", label="xz -9")
    right.set_xlim(left=0)
    highest = max(row.get("eval_bits_per_byte", 0) for row in rows)
    right.set_ylim(0, 1.1 * max(xz, highest))
    right.legend()
    return figure


if __name__ == "__main__":
    main()
