"""The steps of a training run: which are there, which are whole, which is meant."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path

from dsjax.config.run_file import RUN_FILE
from dsjax.weights.finite import NonFiniteError
from dsjax.weights.param_store import ITEM, METADATA_FILE, OPTIMIZER
from dsjax.weights.step_parts import STEP_METADATA_FILE

STEPS_FOLDER = "checkpoints"  # of a run; each step is a folder in it
# Files without which a step is damaged.
_STEP_PARTS = (
    STEP_METADATA_FILE,
    *(f"{item}/{name}" for item in (ITEM, OPTIMIZER) for name in (METADATA_FILE, "manifest.ocdbt")),
)

_LOG = logging.getLogger(__name__)


def steps_of(run: Path) -> list[Path]:
    """Returns the folders of a run's steps in the order in which they are to be tried.

    The newest is first; those that lack a part, as after a power loss, come last.
    """
    folder = run / STEPS_FOLDER
    steps = [step for step in (folder.iterdir() if folder.is_dir() else ()) if _is_step(step)]
    steps.sort(key=lambda step: int(step.name), reverse=True)
    return sorted(steps, key=lambda step: bool(missing_parts(step)))  # is stable


def latest_step(run: Path) -> Path:
    """Returns the folder of a run's latest complete step."""
    steps = [step for step in steps_of(run) if (step / ITEM / METADATA_FILE).is_file()]
    if not steps:
        raise ValueError(f"{run / STEPS_FOLDER}: holds no complete step")
    return steps[0]


def chosen_step(where: Path, step: int | None) -> Path:
    """Returns the folder of a step of a run; without a step, the path as it is.

    Raises:
        ValueError: it is no run, or has no such step; names those that it has.
    """
    if step is None:
        return where
    chosen = where / STEPS_FOLDER / str(step)
    if not (where / RUN_FILE).is_file():
        raise ValueError(f"step={step}: {where} is no training run, so it has no steps")
    if not chosen.is_dir():
        there = ", ".join(sorted((path.name for path in steps_of(where)), key=int)) or "none"
        raise ValueError(f"step={step}: {where} has no such step; it has {there}")
    return chosen


def first_readable[T](run: Path, read: Callable[[Path], T]) -> T:
    """Reads the newest step of a run that can be read, and says loudly what it passed over.

    Args:
        run: the run's folder.
        read: reads one step; ValueError and OSError say that it is damaged.

    Raises:
        NonFiniteError: weights are NaN or infinite: read as they were written, so no step is
            taken in their place.
        ValueError: no step can be read; of the newest one, what `read` raised.
    """
    faults: dict[Path, Exception] = {}
    steps = steps_of(run)
    for taken in steps:
        try:
            result = read(taken)
        except NonFiniteError:
            raise
        except (ValueError, OSError) as error:
            faults[taken] = error
            continue
        for step in steps:
            if int(step.name) > int(taken.name):
                reason = f"it lacks {', '.join(missing_parts(step))}"
                if step in faults:
                    reason = str(faults[step]).splitlines()[0]
                _LOG.warning("DAMAGED: %s: %s; taking step %s instead", step, reason, taken.name)
        return result
    if not steps:
        raise ValueError(f"{run / STEPS_FOLDER}: holds no complete step")
    raise faults[steps[0]]


def _is_step(path: Path) -> bool:
    return bool(re.fullmatch(r"\d+", path.name)) and path.is_dir()


def missing_parts(step: Path) -> list[str]:
    """Returns the files, relative to a step of a run, that it lacks or that are empty."""
    return [part for part in _STEP_PARTS if not _is_written(step / part)]


def _is_written(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0
