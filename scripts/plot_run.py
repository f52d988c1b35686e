"""Draws a run from the figures in its folder; it may still be going on.

    python scripts/plot_run.py runs/v2_pretraining
    python scripts/plot_run.py quickstart_output/run --output curves.png

Loss, held-out bits per byte, learning rate and batch, gradient norm, speed, and of a model with
experts their load, the entropy of the routers and what was dropped.
"""

from __future__ import annotations

from pathlib import Path

from arguments import command_line, one_line_errors, png

from dsjax.config.run_file import read_run_file
from dsjax.training.picture import draw_run, read_metrics


def main() -> None:
    """Reads the arguments and writes the picture."""
    parser = command_line(__doc__)
    parser.add_argument("run", type=Path, help="the run's folder, which holds run.json")
    parser.add_argument("--output", type=png, help="a PNG; default run.png in the run's folder")
    arguments = parser.parse_args()
    output = arguments.output or arguments.run / "run.png"
    with one_line_errors():
        config = read_run_file(arguments.run)
        draw_run(read_metrics(arguments.run), config).savefig(output, dpi=120)
        print(output)


if __name__ == "__main__":
    main()
