"""A run as a picture, drawn from its `metrics.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dsjax.config import TrainConfig
from dsjax.config.run_file import METRICS_FILE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Figures = dict[str, Any]  # a line of it
_EVALUATED = "eval_bits_per_byte"


def read_metrics(run: Path) -> list[Figures]:
    """Reads the figures that a run has written so far; none where it has not begun."""
    path = run / METRICS_FILE
    if not path.exists():
        return []
    lines = path.read_bytes().rpartition(b"\n")[0].splitlines()  # the last may be half written
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # damaged by a power loss: the next start of the run drops it
            continue
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return rows


def smoothed(values: Sequence[float], width: int = 5) -> list[float]:
    """Returns lines through neighbours, weighted by a bell `width` values wide.

    A mean of neighbours would lag at both ends, where all of them lie on one side: a loss that
    falls fast at first would seem to begin far below its first values.
    """
    distance = np.arange(-3 * width, 3 * width + 1)
    bell = np.exp(-0.5 * (distance / width) ** 2)

    def around(weighted: Sequence[float], power: int) -> np.ndarray:
        sums = np.convolve(weighted, (bell * distance**power)[::-1])
        return sums[3 * width : 3 * width + len(weighted)]

    sums = [around(np.ones(len(values)).tolist(), power) for power in range(3)]
    level, tilt = around(values, 0), around(values, 1)
    spread = sums[0] * sums[2] - sums[1] ** 2
    lone = spread < 1e-9  # a single value has no slope
    line = (sums[2] * level - sums[1] * tilt) / np.where(lone, 1, spread)
    return np.where(lone, level / sums[0], line).tolist()


def draw_loss(axes: Any, rows: Sequence[Figures]) -> None:
    """Draws each step's cross entropy in light, its smoothed course, and the skipped steps."""
    steps, losses = _course(rows, "cross_entropy")
    axes.plot(steps, losses, color="C0", alpha=0.25, label="single steps")
    axes.plot(steps, smoothed(losses, max(2, len(losses) // 20)), color="C0", label="smoothed")
    skipped = [row["step"] for row in rows if row.get("skipped")]
    if skipped:
        low = [min(losses)] * len(skipped)
        axes.plot(skipped, low, "|", color="C3", markersize=12, label=f"{len(skipped)} skipped")
    axes.set(title="Training loss", xlabel="step", ylabel="cross entropy (nats per token)")
    axes.legend()


def draw_held_out(axes: Any, rows: Sequence[Figures], held_out: str) -> None:
    """Draws the evaluations.

    Args:
        axes: where.
        rows: the run's figures.
        held_out: says of which documents they are.
    """
    axes.plot(*_course(rows, _EVALUATED), color="C1", marker="o", label="model")
    averages = _course(rows, "eval_ema_bits_per_byte")
    if averages[0]:
        axes.plot(*averages, color="C2", marker=".", label="moving average")
        axes.legend()
    axes.set(title=held_out, xlabel="step", ylabel="bits per byte")


def draw_run(rows: Sequence[Figures], config: TrainConfig) -> Figure:
    """Draws a run: its loss, evaluations, schedule, gradients, speed, and what its experts do.

    Args:
        rows: its figures.
        config: what it is.

    Raises:
        ValueError: there are no figures of a step.
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("a picture needs matplotlib: pip install 'dsjax[plots]'") from None
    if not any("cross_entropy" in row for row in rows):
        raise ValueError(f"{config.directory}/{METRICS_FILE}: holds no figures of a step yet")
    panels = [panel for panel in _PANELS if any(row.get(panel.needs) is not None for row in rows)]
    columns = min(3, len(panels))
    height = -(-len(panels) // columns)
    figure = Figure(figsize=(5.0 * columns, 3.5 * height + 0.5), layout="constrained")
    grid = figure.subplots(height, columns, squeeze=False).flat
    for axes, panel in zip(grid, panels, strict=False):
        panel.draw(axes, rows, config)
        if not axes.images:
            axes.grid(alpha=0.2)
    for axes in list(grid)[len(panels) :]:
        axes.axis("off")
    last = max(row["step"] for row in rows)
    read = max((row["tokens"] for row in rows if "tokens" in row), default=0)
    figure.suptitle(
        f"{config.directory}: step {last:,} of {config.num_steps:,}, {_short(read)} tokens"
    )
    return figure


def _schedule(axes: Any, rows: Sequence[Figures], config: TrainConfig) -> None:
    axes.plot(*_course(rows, "learning_rate"), color="C0")
    axes.set(title="Learning rate and batch", xlabel="step", ylim=(0, None))
    axes.set_ylabel("learning rate", color="C0")
    right = axes.twinx()
    right.plot(*_course(rows, "batch_size"), color="C1", drawstyle="steps-pre")
    right.set_ylim(0, 1.1 * right.get_ylim()[1])
    right.locator_params(axis="y", integer=True)
    right.set_ylabel("sequences a step", color="C1")


def _norm(axes: Any, rows: Sequence[Figures], config: TrainConfig) -> None:
    axes.semilogy(*_course(rows, "gradient_norm"), color="C2", alpha=0.8)
    clip = config.optimizer.clip_norm
    axes.axhline(clip, color="gray", linestyle="--", label=f"clipped to {clip:g}")
    axes.set(title="Gradient norm", xlabel="step")
    for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatter("{x:g}")
    axes.legend()


def _speed(axes: Any, rows: Sequence[Figures], config: TrainConfig) -> None:
    steps, speeds = _course(rows, "tokens_per_second")
    unit, scale = ("thousand ", 1e3) if max(speeds) >= 1e4 else ("", 1.0)
    axes.plot(steps, np.divide(speeds, scale), color="C0", alpha=0.8)
    median = float(np.median(speeds))
    axes.axhline(median / scale, color="gray", linestyle="--", label=f"median {median:,.0f}")
    axes.set(title="Speed", xlabel="step", ylim=(0, None), ylabel=f"{unit}tokens a second")
    mfu = [row["mfu"] for row in rows if "mfu" in row]
    if mfu:
        axes.plot([], [], " ", label=f"median MFU {np.median(mfu):.1%}")
    axes.legend(loc="lower right")


def _imbalance(axes: Any, rows: Sequence[Figures], config: TrainConfig) -> None:
    for color, prefix, name in (("C0", "", "experts"), ("C1", "device_", "groups")):
        for suffix, style, which in (("", "-", "worst layer"), ("_mean", "--", "mean layer")):
            steps, values = _course(rows, f"{prefix}load_imbalance{suffix}")
            if steps:
                axes.plot(steps, values, style, color=color, label=f"{name}, {which}")
    axes.axhline(1, color="gray", linewidth=0.8)
    axes.set(title="Load of the busiest over the mean", xlabel="step")
    axes.set_ylim(0.9, 0.9 + 1.35 * (axes.get_ylim()[1] - 0.9))  # room for the legend
    axes.legend(fontsize="small", ncols=2, loc="upper center")


def _loads(axes: Any, rows: Sequence[Figures], config: TrainConfig) -> None:
    line = next(row for row in reversed(rows) if row.get("expert_load") is not None)
    load_LE = np.asarray(line["expert_load"]) * len(line["expert_load"][0])
    first = config.model.num_dense_layers
    image = axes.imshow(
        load_LE,
        aspect="auto",
        cmap="RdBu_r",
        vmin=0,
        vmax=2,
        interpolation="nearest",
        extent=(-0.5, load_LE.shape[1] - 0.5, first + len(load_LE) - 0.5, first - 0.5),
    )
    axes.set(title=f"Load of each expert, step {line['step']:,}", xlabel="expert", ylabel="layer")
    axes.locator_params(axis="both", integer=True)
    axes.figure.colorbar(image, ax=axes, extend="max", label="over the mean")


def _dropped(axes: Any, rows: Sequence[Figures], config: TrainConfig) -> None:
    steps, shares = _course(rows, "dropped_share")
    axes.plot(steps, np.multiply(shares, 100), color="C3")
    said = "" if config.loss.dropping is not None else " (loss.dropping is none)"
    axes.set(title=f"Dropped assignments{said}", xlabel="step", ylabel="%", ylim=(0, None))


def _entropy(axes: Any, rows: Sequence[Figures], config: TrainConfig) -> None:
    axes.plot(*_course(rows, "router_entropy"), color="C4")
    if config.model.moe is not None:
        most = float(np.log(config.model.moe.num_experts))
        axes.axhline(most, color="gray", linestyle="--", label="all experts alike")
        axes.legend()
    axes.set(title="Entropy of the routers", xlabel="step", ylabel="nats, mean of the layers")
    axes.set_ylim(0, 1.1 * axes.get_ylim()[1])


def _held_out(axes: Any, rows: Sequence[Figures], config: TrainConfig) -> None:
    where = ", ".join(source.path for source in config.data.eval_sources)
    taken = f"{config.log.eval_rows:,} rows" if config.log.eval_rows else "all rows"
    where = where if len(where) <= 40 else f"…{where[-40:]}"
    draw_held_out(axes, rows, f"Held out: {taken} of\n{where}")


class _Panel(NamedTuple):
    """One of the pictures, and the figure without which it is left out."""

    needs: str
    draw: Callable[[Any, Sequence[Figures], TrainConfig], None]


_PANELS = (
    _Panel("cross_entropy", lambda axes, rows, _: draw_loss(axes, rows)),
    _Panel(_EVALUATED, _held_out),
    _Panel("learning_rate", _schedule),
    _Panel("gradient_norm", _norm),
    _Panel("tokens_per_second", _speed),
    _Panel("load_imbalance", _imbalance),
    _Panel("expert_load", _loads),
    _Panel("router_entropy", _entropy),
    _Panel("dropped_share", _dropped),
)


def _course(rows: Sequence[Figures], name: str) -> tuple[list[int], list[float]]:
    """Returns the steps that have a figure, and the figure; null is one that was not finite."""
    found = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def _short(count: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"
