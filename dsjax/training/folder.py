"""A run's folder is one run's: whoever starts another in it is refused."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dsjax.files import LockHeldError, locked

LOCK_FILE = "run.lock"


@contextlib.contextmanager
def only_run_in(run: Path) -> Iterator[None]:
    """Makes a run's folder and keeps other runs out of it while the body runs.

    The first process holds the lock for all; all of them are refused together.

    Raises:
        LockHeldError: another run is going on there; says whose.
        OSError: the folder cannot be made.
    """
    new = not run.exists()
    with contextlib.ExitStack() as held:
        refused: OSError | LockHeldError | None = None
        if jax.process_index() == 0:
            try:
                run.mkdir(parents=True, exist_ok=True)
                held.enter_context(locked(run / LOCK_FILE))
            except (OSError, LockHeldError) as error:
                refused = error
        (message, *_) = gather_json({"refused": "" if refused is None else str(refused)})
        if refused is not None:
            raise refused
        if message["refused"]:
            raise LockHeldError(message["refused"])
        try:
            yield
        except BaseException:
            if new and jax.process_index() == 0:
                _remove_if_unused(run)
            raise


def _remove_if_unused(run: Path) -> None:
    """Removes a run's folder that holds nothing but its lock: of a run that did not begin."""
    if [path.name for path in run.iterdir()] == [LOCK_FILE]:
        (run / LOCK_FILE).unlink()
        run.rmdir()


def gather_json(value: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns every process's value, on every process."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(text.size))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: text.size] = text
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:size]).decode()) for row, size in zip(rows, sizes, strict=True)]
