"""A run's checkpoints: saved while training goes on, restored onto any mesh."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from orbax.checkpoint import v1 as ocp

from dsjax.config import CheckpointConfig, TrainConfig
from dsjax.files import retried
from dsjax.training.folder import gather_json
from dsjax.training.optimizer import Moments
from dsjax.training.step import Guard, TrainState
from dsjax.weights.checksums import sealed
from dsjax.weights.layouts import current_path, format_1_path, is_format_1, renamed
from dsjax.weights.param_store import EMA, saving_context, stored_paths
from dsjax.weights.run_steps import (
    STEPS_FOLDER,
    chosen_step,
    first_readable,
    steps_of,
)
from dsjax.weights.step_parts import STEP_METADATA_FILE, check_step

# Of a run: where steps that could not be read are moved, and those after a step that was chosen.
DAMAGED_FOLDER = "damaged"
SET_ASIDE_FOLDER = "set_aside"
# In the name of a step that is being saved, of orbax's.
_UNFINISHED = ".orbax-checkpoint-tmp"
_MOST_CLEANING_SECONDS = 10.0
_LOG = logging.getLogger(__name__)
# The parameters, the optimizer's state, and every process's data state.
Restored = tuple[nnx.State, dict[str, Any], list[dict[str, Any]]]


def _is_no_echo(record: logging.LogRecord) -> bool:
    """Tells a log record from what orbax's tasks say of an error that is raised as well."""
    text = record.getMessage()
    return not ("exception was never retrieved" in text and ("orbax" in text or "zarr" in text))


# For good: such a task speaks when it is collected, long after the error was dealt with.
logging.getLogger("asyncio").addFilter(_is_no_echo)


class OtherTypes(ValueError):
    """A step is whole, and holds other types than the run asks for."""


class RunCheckpoints:
    """The checkpoints of one run, `<run>/checkpoints/<step>`.

    Each holds the checkpointables `params`, a nested dict as converted models have it, and
    `optimizer`. Its custom metadata holds the state of the data on every host. A step is complete
    or not there: orbax writes to a temporary folder and renames it last.
    """

    def __init__(self, run: Path, config: CheckpointConfig):
        training = ocp.training
        kept: list[Any] = [training.preservation_policies.LatestN(config.keep_latest)]
        if config.keep_every is not None:
            kept.append(training.preservation_policies.EveryNSteps(config.keep_every))
        self._run = run
        self._folder = run / STEPS_FOLDER
        self._kept = training.preservation_policies.AnyPreservationPolicy(kept)
        self._checkpointer = self._open()

    def _open(self) -> Any:
        self._move_unlisted()
        return ocp.training.Checkpointer(
            self._folder,
            # Cut so that generation and conversion can read a layer or an expert by itself.
            context=saving_context(),
            preservation_policy=self._kept,
            cleanup_tmp_directories=True,
        )

    def _move_unlisted(self) -> None:
        """Moves steps to `<run>/damaged` at which orbax cannot even list the others.

        It reads the description of every step then, and fails where JSON holds no object.

        Raises:
            ValueError: there are no other steps; nothing was moved.
        """
        steps = steps_of(self._run)
        unlisted = [step for step in steps if _is_unlisted(step)]
        if unlisted and len(unlisted) == len(steps):
            raise ValueError(f"{unlisted[0] / STEP_METADATA_FILE}: is damaged: holds no object")
        gather_json({})  # all have looked
        if jax.process_index() == 0:
            for step in unlisted:
                _LOG.warning("DAMAGED: %s: holds no object; moved", step / STEP_METADATA_FILE)
                _move_away(step, self._run / DAMAGED_FOLDER)
        gather_json({})  # all wait until they are gone

    @property
    def latest(self) -> int | None:
        """The newest complete step, or None."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def restore_newest(self, params: nnx.State, optimizer: dict[str, Any]) -> Restored | None:
        """Loads the newest step that is not damaged, as `restore`; None where there is no step.

        A damaged step is said loudly and moved to `<run>/damaged`, out of the way of the steps
        that come again.

        Raises:
            ValueError: every step is damaged, or of another config; nothing was moved.
            StorageError: the storage does not answer; nothing was moved.
        """
        steps = steps_of(self._run)
        if not steps:
            return None

        def read(step: Path) -> tuple[int, Any]:
            number = int(step.name)
            return number, self.restore(number, params, optimizer)

        taken, restored = first_readable(self._run, read)
        self._move_later(taken, DAMAGED_FOLDER)
        return restored

    def restore_chosen(self, step: int, params: nnx.State, optimizer: dict[str, Any]) -> Restored:
        """Loads a step that the user names; later ones are moved to `<run>/set_aside`.

        Raises:
            ValueError: there is no such step, or it is damaged; nothing was moved.
            StorageError: the storage does not answer; nothing was moved.
        """
        chosen_step(self._run, step)
        restored = self.restore(step, params, optimizer)
        self._move_later(step, SET_ASIDE_FOLDER)
        return restored

    def _move_later(self, step: int, folder: str) -> None:
        """Moves the steps after one out of the way of those that come again."""
        later = [path for path in steps_of(self._run) if int(path.name) > step]
        if not later:
            return
        self._checkpointer.close()
        if jax.process_index() == 0:
            for path in later:
                _move_away(path, self._run / folder)
        gather_json({})  # all wait until they are gone
        self._checkpointer = self._open()

    @property
    def is_saving(self) -> bool:
        """Whether a save is still being written."""
        return bool(self._checkpointer.is_saving_in_progress())

    def reopen(self) -> None:
        """Begins anew after a save that failed, and removes what it left."""
        with contextlib.suppress(Exception):  # it says again what `wait` has said
            self._checkpointer.close()
        if jax.process_index() == 0:
            _remove_unfinished(self._folder)
        self._checkpointer = self._open()

    def save(
        self, step: int, params: nnx.State, optimizer: dict[str, Any], data_state: dict[str, Any]
    ) -> None:
        """Starts to save a step; training may go on at once, and donate what it gave.

        Args:
            step: steps taken so far.
            params: the model's parameters.
            optimizer: everything else that training changes.
            data_state: this process's place in its data.

        Raises:
            RuntimeError: this save or the one before it failed; names the folder.
        """
        if step == self.latest:
            return
        self.wait()
        try:
            self._checkpointer.save_checkpointables_async(
                step,
                {"params": nnx.to_pure_dict(params), "optimizer": optimizer},
                force=True,
                custom_metadata=sealed({"data": gather_json(data_state), "step": step}),
            )
        except Exception as error:  # orbax and tensorstore raise many kinds
            first_line = (str(error).splitlines() or [type(error).__name__])[0]
            raise RuntimeError(f"{self._folder / str(step)}: not saved: {first_line}") from error

    def wait(self) -> None:
        """Waits until the last save is complete.

        Raises:
            RuntimeError: it failed, a full disk for instance; earlier steps are still there.
        """
        try:
            self._checkpointer.wait()
        except Exception as error:  # orbax and tensorstore raise many kinds
            first_line = str(error).splitlines()[0]
            raise RuntimeError(f"{self._folder}: saving failed: {first_line}") from error

    def restore(self, step: int, params: nnx.State, optimizer: dict[str, Any]) -> Restored:
        """Loads a step into the given shapes, dtypes and shardings.

        Args:
            step: a complete step.
            params: abstract parameters whose leaves carry concrete shardings.
            optimizer: likewise, as `save` took it.

        Returns:
            The parameters, the optimizer's state, and every process's data state.

        Raises:
            ValueError: the checkpoint is damaged, or of another config.
            StorageError: the storage does not answer, however often it is asked.
        """
        # Several processes read together: one alone cannot begin again, so all end.
        retries = 3 if jax.process_count() == 1 else 0
        return retried(
            str(self._folder / str(step)), lambda: self._restore(step, params, optimizer), retries
        )

    def _restore(self, step: int, params: nnx.State, optimizer: dict[str, Any]) -> Restored:
        abstract = {"params": nnx.to_pure_dict(params), "optimizer": optimizer}
        # First, as orbax opens all arrays at once and leaves a traceback for each that fails.
        metadata = check_step(self._folder / str(step))
        try:
            old = is_format_1(stored_paths(self._folder / str(step)))
            if old:
                abstract = _renamed(abstract, format_1_path)
            for item, wanted in abstract.items():
                stored = self._checkpointer.checkpointables_metadata(step).metadata[item]
                _check_dtypes(wanted, stored, self._folder / str(step) / item)
            loaded = self._checkpointer.load_checkpointables(step, abstract)
            if old:
                loaded = _renamed(loaded, current_path)
        except OtherTypes:
            raise
        except (ValueError, KeyError, OSError) as error:
            # Orbax names the handlers it tried, which is no help.
            raise ValueError(
                f"{self._folder / str(step)}: is damaged, or of another config.model or "
                "config.optimizer than this run's"
            ) from error
        restored = jax.tree.map(lambda leaf: leaf, params)
        nnx.replace_by_pure_dict(restored, loaded["params"])
        return restored, loaded["optimizer"], metadata["data"]

    def __enter__(self) -> RunCheckpoints:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.wait()
        finally:
            self._checkpointer.close()


def _remove_unfinished(folder: Path) -> None:
    """Removes what a failed save left, and what its threads still write meanwhile.

    The next save would remove it too, but fails where such a thread writes just then.
    """
    end, looks = time.monotonic() + _MOST_CLEANING_SECONDS, 0
    while looks < 3 and time.monotonic() < end:
        left = list(folder.glob(f"*{_UNFINISHED}*"))
        for path in left:
            shutil.rmtree(path, ignore_errors=True)
        looks = 0 if left else looks + 1
        time.sleep(0.02)


def _is_unlisted(step: Path) -> bool:
    try:
        found = json.loads((step / STEP_METADATA_FILE).read_bytes())
    except (OSError, ValueError):  # such a step orbax passes over by itself
        return False
    return not isinstance(found, dict)


def _move_away(step: Path, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    target = folder / step.name
    count = 1
    while target.exists():
        count += 1
        target = folder / f"{step.name}_{count}"
    step.rename(target)


def optimizer_to_dict(state: TrainState) -> dict[str, Any]:
    """Returns all of a state but the parameters, with string keys, as `RunCheckpoints` takes it."""
    moments = state.moments
    trees = {name: nnx.to_pure_dict(getattr(moments, name)) for name in _trees_of(moments)}
    return {
        "step": state.step,
        "guard": dict(vars(state.guard)),
        "count": moments.count,
        **trees,
    }


def state_from_dict(
    optimizer: dict[str, Any], params: nnx.State, abstract: TrainState
) -> TrainState:
    """Undoes `optimizer_to_dict`; the abstract state gives the structure."""
    trees: dict[str, Any] = {"lost": None, EMA: None}
    for name in _trees_of(abstract.moments):
        trees[name] = jax.tree.map(lambda leaf: leaf, getattr(abstract.moments, name))
        nnx.replace_by_pure_dict(trees[name], optimizer[name])
    return TrainState(
        step=optimizer["step"],
        params=params,
        moments=Moments(count=optimizer["count"], **trees),
        guard=Guard(**optimizer["guard"]),
    )


def check_stored_forms(there: TrainConfig, here: TrainConfig, where: str) -> None:
    """Refuses to go on with what the run does not have: to cast it in silence is no resume.

    Args:
        there: what the run was.
        here: what it is to be.
        where: the run, for messages.

    Raises:
        ValueError: names the fields.
    """
    forms: list[tuple[str, str, str]] = [
        ("runtime.param_dtype", there.runtime.param_dtype, here.runtime.param_dtype),
        ("optimizer.moment_dtype", there.optimizer.moment_dtype, here.optimizer.moment_dtype),
    ]
    if "compensated" in (there.optimizer.rounding, here.optimizer.rounding):
        forms.append(("optimizer.rounding", there.optimizer.rounding, here.optimizer.rounding))
    if (there.optimizer.ema_decay is None) != (here.optimizer.ema_decay is None):
        old, new = (str(config.optimizer.ema_decay).lower() for config in (there, here))
        forms.append(("optimizer.ema_decay", old, new))
    frozen = [str(tuple(sorted({*config.optimizer.frozen}))) for config in (there, here)]
    forms.append(("optimizer.frozen", frozen[0], frozen[1]))
    faults = [f"{name}={new} (it was {old})" for name, old, new in forms if old != new]
    if faults:
        raise ValueError(
            f"{where}: its checkpoints hold another state than {'; '.join(faults)}; go on as it "
            "was, or give another directory and init_from"
        )


def _trees_of(moments: Moments) -> list[str]:
    optional = [name for name in ("lost", EMA) if getattr(moments, name) is not None]
    return ["mu", "nu", *optional]


def _check_dtypes(wanted: Any, stored: Any, where: Path) -> None:
    """Compares types with those that a step was stored in: orbax would cast in silence."""
    found = {path: leaf.dtype for path, leaf in jax.tree.leaves_with_path(stored)}
    for path, leaf in jax.tree.leaves_with_path(wanted):
        if path in found and found[path] != leaf.dtype:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise OtherTypes(
                f"{where}: {name} was stored as {found[path]}, not {leaf.dtype}: give "
                "runtime.param_dtype and optimizer.moment_dtype as they were"
            )


def _renamed(
    items: Mapping[str, Any], rename: Callable[[tuple[str, ...]], tuple[str, ...]]
) -> dict[str, Any]:
    """Moves the parameters, and the moments beside them, to other paths."""
    optimizer = dict(items["optimizer"])
    for name in ("mu", "nu", "lost", EMA):
        if name in optimizer:
            optimizer[name] = renamed(optimizer[name], rename)
    return {
        "params": renamed(items["params"], rename),
        "optimizer": optimizer,
    }
