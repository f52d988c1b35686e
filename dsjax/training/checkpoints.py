"""A run's checkpoints: saved while training goes on, restored onto any mesh."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import optax
from flax import nnx
from orbax.checkpoint import v1 as ocp

from dsjax.config import CheckpointConfig
from dsjax.training.folder import gather_json
from dsjax.training.step import Guard, TrainState
from dsjax.weights.layouts import current_path, format_1_path, is_format_1, renamed
from dsjax.weights.param_store import saving_context, stored_paths
from dsjax.weights.sources import STEPS_FOLDER, first_readable, steps_of

# Of a run; steps that could not be read are moved here.
DAMAGED_FOLDER = "damaged"


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
        return ocp.training.Checkpointer(
            self._folder,
            # Cut so that generation and conversion can read a layer or an expert by itself.
            context=saving_context(),
            preservation_policy=self._kept,
            cleanup_tmp_directories=True,
        )

    @property
    def latest(self) -> int | None:
        """The newest complete step, or None."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def restore_newest(
        self, params: nnx.State, optimizer: dict[str, Any]
    ) -> tuple[nnx.State, dict[str, Any], list[dict[str, Any]]] | None:
        """Loads the newest step that is not damaged, as `restore`; None where there is no step.

        A damaged step is said loudly and moved to `<run>/damaged`, out of the way of the steps
        that come again.

        Raises:
            ValueError: every step is damaged, or of another config; nothing was moved.
        """
        steps = steps_of(self._run)
        if not steps:
            return None

        def read(step: Path) -> tuple[int, Any]:
            number = int(step.name)
            return number, self.restore(number, params, optimizer)

        taken, restored = first_readable(self._run, read)
        passed_over = [step for step in steps if int(step.name) > taken]
        if passed_over:
            self._checkpointer.close()
            if jax.process_index() == 0:
                for step in passed_over:
                    _move_away(step, self._run / DAMAGED_FOLDER)
            gather_json({})  # all wait until they are gone
            self._checkpointer = self._open()
        return restored

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
                custom_metadata={"data": gather_json(data_state)},
            )
        except OSError as error:
            raise RuntimeError(f"{self._folder / str(step)}: not saved: {error}") from error

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

    def restore(
        self, step: int, params: nnx.State, optimizer: dict[str, Any]
    ) -> tuple[nnx.State, dict[str, Any], list[dict[str, Any]]]:
        """Loads a step into the given shapes, dtypes and shardings.

        Args:
            step: a complete step.
            params: abstract parameters whose leaves carry concrete shardings.
            optimizer: likewise, as `save` took it.

        Returns:
            The parameters, the optimizer's state, and every process's data state.

        Raises:
            ValueError: the checkpoint is of another config.
        """
        abstract = {"params": nnx.to_pure_dict(params), "optimizer": optimizer}
        try:
            old = is_format_1(stored_paths(self._folder / str(step)))
            if old:
                abstract = _renamed(abstract, format_1_path)
            loaded = self._checkpointer.load_checkpointables(step, abstract)
            if old:
                loaded = _renamed(loaded, current_path)
        except (ValueError, KeyError, OSError) as error:
            # Orbax names the handlers it tried, which is no help.
            raise ValueError(
                f"{self._folder / str(step)}: is damaged, or of another config.model or "
                "config.optimizer than this run's"
            ) from error
        restored = jax.tree.map(lambda leaf: leaf, params)
        nnx.replace_by_pure_dict(restored, loaded["params"])
        metadata = self._checkpointer.checkpointables_metadata(step).custom_metadata
        if not metadata or "data" not in metadata:
            raise ValueError(f"{self._folder / str(step)}: is damaged: the data's place is missing")
        return restored, loaded["optimizer"], metadata["data"]

    def __enter__(self) -> RunCheckpoints:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.wait()
        finally:
            self._checkpointer.close()


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
    adam = {name: optax.tree_utils.tree_get(state.moments, name) for name in ("count", "mu", "nu")}
    return {
        "step": state.step,
        "guard": dict(vars(state.guard)),
        "count": adam["count"],
        "mu": nnx.to_pure_dict(adam["mu"]),
        "nu": nnx.to_pure_dict(adam["nu"]),
    }


def state_from_dict(
    optimizer: dict[str, Any], params: nnx.State, abstract: TrainState
) -> TrainState:
    """Undoes `optimizer_to_dict`; the abstract state gives the structure."""
    moments = {"count": optimizer["count"]}
    for name in ("mu", "nu"):
        moments[name] = jax.tree.map(lambda leaf: leaf, params)
        nnx.replace_by_pure_dict(moments[name], optimizer[name])
    return TrainState(
        step=optimizer["step"],
        params=params,
        moments=optax.tree_utils.tree_set(abstract.moments, **moments),
        guard=Guard(**optimizer["guard"]),
    )


def _renamed(
    items: Mapping[str, Any], rename: Callable[[tuple[str, ...]], tuple[str, ...]]
) -> dict[str, Any]:
    """Moves the parameters, and the moments beside them, to other paths."""
    moments = {name: renamed(items["optimizer"][name], rename) for name in ("mu", "nu")}
    return {
        "params": renamed(items["params"], rename),
        "optimizer": {**items["optimizer"], **moments},
    }
