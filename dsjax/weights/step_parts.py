"""The parts of one step of a run: whether all are there, whole, and of this very step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsjax.files import read_json
from dsjax.weights.checksums import is_sound
from dsjax.weights.param_store import OPTIMIZER, ParamStore

STEP_METADATA_FILE = "_CHECKPOINT_METADATA"  # orbax's, of a whole step


def read_step_metadata(step: Path) -> dict[str, Any]:
    """Reads what a run keeps beside the arrays of a step: every process's place in the data.

    Args:
        step: the folder of one step of a run.

    Raises:
        OSError: it is not there; names the file.
        ValueError: it is damaged, or another step's; names the file.
    """
    path = step / STEP_METADATA_FILE
    found = read_json(path).get("custom_metadata")
    if not isinstance(found, dict) or "data" not in found:
        raise ValueError(f"{path}: damaged: the data's place is missing")
    if not is_sound(found):
        raise ValueError(f"{path}: damaged: the data's place")
    if found.get("step", int(step.name)) != int(step.name):  # older versions did not say
        raise ValueError(f"{path}: damaged: it is of step {found['step']}")
    return found


def check_step(step: Path) -> dict[str, Any]:
    """Opens all that a run keeps of a step, and reads none of its large arrays.

    Returns:
        What `read_step_metadata` does.

    Raises:
        OSError: a file cannot be read; names it.
        ValueError: a part is damaged, or of another step; names it.
    """
    metadata = read_step_metadata(step)
    ParamStore.open(step)
    optimizer = ParamStore.open(step, item=OPTIMIZER)
    if ("step",) in optimizer.arrays and int(optimizer.read(("step",), ())) != int(step.name):
        raise ValueError(f"{step / OPTIMIZER}: damaged: it is of another step")
    return metadata
