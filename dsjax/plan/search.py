"""Tries other meshes, rows, remat policies and exchange chunks of a run, one plan after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, get_args

from dsjax.config import MeshConfig, TrainConfig
from dsjax.config.runtime import RematPolicy

_CHUNKS = (1, 2, 4)


@dataclass(frozen=True)
class Trial:
    """A run as it was tried.

    Attributes:
        run: the run.
        changes: what differs from the run that was given, as overrides.
        figures: its plan; None where it has none.
        refusal: why there is none: it does not fit or divide.
    """

    run: TrainConfig
    changes: tuple[str, ...]
    figures: dict[str, Any] | None
    refusal: str = ""

    @property
    def speed(self) -> float:
        """Modelled tokens a second of a chip; 0 for what does not fit."""
        return 0.0 if self.figures is None else self.figures["tokens_per_second_per_chip"]

    def __str__(self) -> str:
        name = " ".join(self.changes) or "as it is"
        if self.figures is None:
            return f"{name}: {self.refusal}"
        return (
            f"{name}: {self.speed:,.0f} tokens/s a chip, MFU {self.figures['modelled_mfu']:.1%}, "
            f"peak {self.figures['peak_bytes'] / 2**30:.1f} GiB, "
            f"compiled in {self.figures['compile_seconds']:.0f} s"
        )


def search(
    run: TrainConfig, chips: int, most: int, plan: Callable[[TrainConfig], dict[str, Any]]
) -> Iterator[Trial]:
    """Yields one trial after another, as each takes minutes; the first is the run as it is.

    One kind of change at a time, from the fastest run so far: the mesh, what the backward pass
    keeps, rows a chip (twice, half), chunks of the exchange. So it finds no pair of changes of
    which each alone is slower.

    Args:
        run: where it starts.
        chips: of the pod, for the meshes.
        most: trials at most.
        plan: plans a run; a ValueError says that it does not fit.
    """
    best: Trial | None = None
    tried: set[TrainConfig] = set()

    def attempt(candidate: TrainConfig) -> Trial:
        tried.add(candidate)
        changes = _changes(run, candidate)
        try:
            return Trial(candidate, changes, plan(candidate))
        except ValueError as error:
            return Trial(candidate, changes, None, str(error).splitlines()[0])

    for variants in (_as_it_is, _meshes, _remats, _rows, _chunks):
        for candidate in variants(run if best is None else best.run, chips):
            if candidate in tried:
                continue
            if len(tried) == most:
                return
            trial = attempt(candidate)
            if trial.speed > (0.0 if best is None else best.speed):
                best = trial
            yield trial


def ranked(trials: list[Trial]) -> list[Trial]:
    """Returns the trials that fit, the fastest first."""
    return sorted((each for each in trials if each.figures), key=lambda each: -each.speed)


def _as_it_is(run: TrainConfig, chips: int) -> list[TrainConfig]:
    return [run]


def _meshes(run: TrainConfig, chips: int) -> list[TrainConfig]:
    """Fsdp times expert, the rest as it is, the nearest to the run's first."""
    mesh, moe = run.mesh, run.model.moe
    left = chips // (max(mesh.data, 1) * max(mesh.tensor, 1) * max(mesh.context, 1))
    sizes = [size for size in range(1, left + 1) if left % size == 0]
    if moe is None:
        sizes = [1]
    else:
        sizes = [size for size in sizes if moe.num_experts % size == 0]
    sizes.sort(key=lambda size: max(size, mesh.expert) / min(size, max(mesh.expert, 1)))
    data = max(mesh.data, 1)
    return [
        replace(run, mesh=MeshConfig(data, left // size, size, mesh.context, mesh.tensor))
        for size in sizes
    ]


def _remats(run: TrainConfig, chips: int) -> list[TrainConfig]:
    policies = get_args(RematPolicy)
    return [replace(run, runtime=replace(run.runtime, remat=policy)) for policy in policies]


def _rows(run: TrainConfig, chips: int) -> list[TrainConfig]:
    size = run.batch.size
    sizes = [2 * size] + ([size // 2] if size % 2 == 0 else [])
    return [replace(run, batch=replace(run.batch, size=size)) for size in sizes]


def _chunks(run: TrainConfig, chips: int) -> list[TrainConfig]:
    kernels = run.runtime.kernels
    return [
        replace(run, runtime=replace(run.runtime, kernels=replace(kernels, exchange_chunks=count)))
        for count in _CHUNKS
    ]


def _changes(before: TrainConfig, after: TrainConfig) -> tuple[str, ...]:
    """What was changed, as overrides that a command takes."""
    fields = {
        "mesh.fsdp": (before.mesh.fsdp, after.mesh.fsdp),
        "mesh.expert": (before.mesh.expert, after.mesh.expert),
        "runtime.remat": (before.runtime.remat, after.runtime.remat),
        "batch.size": (before.batch.size, after.batch.size),
        "runtime.kernels.exchange_chunks": (
            before.runtime.kernels.exchange_chunks,
            after.runtime.kernels.exchange_chunks,
        ),
    }
    return tuple(f"{name}={new}" for name, (old, new) in fields.items() if old != new)
