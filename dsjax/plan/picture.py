"""A plan as a picture: memory by kind and time by kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_MEMORY = ("parameter", "optimizer", "cache", "activation")
_TIME = ("compute", "copy", "collective")


def draw_plan(figures: dict[str, Any], path: str | Path) -> None:
    """Writes a PNG of a plan.

    Args:
        figures: what `plan_training` or `plan_serving` returns.
        path: of the file, which must end in ".png".

    Raises:
        ValueError: another ending.
        ImportError: matplotlib is missing.
    """
    if Path(path).suffix != ".png":
        raise ValueError(f"picture {str(path)!r}: must end in .png")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("a picture needs matplotlib: pip install 'dsjax[plots]'") from None
    timed = "modelled_seconds" in figures  # on cards nothing is
    figure = Figure(figsize=(8, 4.4 if timed else 2.4), layout="constrained")
    memory, *rest = figure.subplots(1 + timed, 1, squeeze=False)[:, 0]
    held = {kind: figures.get(f"{kind}_bytes", 0) / 2**30 for kind in _MEMORY}
    _bar(memory, {kind: size for kind, size in held.items() if size})
    memory.axvline(figures["capacity_bytes"] / 2**30, color="black", linestyle="--")
    memory.set_xlabel("GiB a chip; dashed: capacity")
    for time in rest:
        _bar(time, {kind: figures[f"{kind}_seconds"] for kind in _TIME})
        time.axvline(figures["modelled_seconds"], color="black", linestyle="--")
        time.set_xlabel("seconds a step, nothing hidden; dashed: with what the schedule hides")
    slices = f" × {figures['slices']}" if figures["slices"] > 1 else ""
    utilisation = f", modelled MFU {figures['modelled_mfu']:.1%}" if timed else ""
    figure.suptitle(f"{figures['topology']}{slices}{utilisation}")
    figure.savefig(path, dpi=120)


def _bar(axes: Any, parts: dict[str, float]) -> None:
    """One bar of parts that follow one another."""
    left = 0.0
    for name, size in parts.items():
        axes.barh([0], [size], left=[left], label=f"{name} {size:.2f}")
        left += size
    axes.set_yticks([])
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.3), ncols=len(parts), frameon=False)
