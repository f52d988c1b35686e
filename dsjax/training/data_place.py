"""Where a run goes on in its data, and whether the place still means what it meant."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

from dsjax.config import DataConfig
from dsjax.config.serialize import differing_fields
from dsjax.data.loader import Loader

_LOG = logging.getLogger(__name__)


def check_data(there: DataConfig, here: DataConfig, where: str) -> None:
    """Compares the data of a run that goes on with those that it had.

    Args:
        there: what the run had.
        here: what it is to have, `on_change` included.
        where: the run, for messages.

    Raises:
        ValueError: they differ and `on_change` is "stop"; names the fields.
    """
    fields = _changes(there, here)
    if not fields:
        return
    changed = "; ".join(fields)
    if here.on_change == "stop":
        raise ValueError(
            f"{where}: its place is in other data: {changed}; data.on_change=keep goes on from the "
            "same count of rows, data.on_change=restart from the beginning"
        )
    _LOG.warning("%s: other data than before (on_change=%s): %s", where, here.on_change, changed)


def keeps_place(there: DataConfig, here: DataConfig) -> bool:
    """Whether a run goes on from its place in the data, and not from their beginning."""
    return here.on_change != "restart" or not _changes(there, here)


def restore_place(loader: Loader, data_states: Sequence[dict[str, Any]], shard: int) -> None:
    """Puts a loader where a checkpoint says that it was.

    Raises:
        ValueError: the place is of another pipeline, or of another number of hosts.
    """
    by_shard = {saved["shard"]: saved["state"] for saved in data_states}
    try:
        # Of packed data all states are one; documents refuse another number of hosts themselves.
        loader.set_state(by_shard.get(shard, by_shard[0]))
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"data: the checkpoint's place is of another pipeline ({type(error).__name__} "
            f"{error}): give data.num_workers and data.sources as they were, or "
            "data.on_change=restart"
        ) from error


def _changes(there: DataConfig, here: DataConfig) -> list[str]:
    """What differs of that on which the order of rows depends."""
    ignored: dict[str, Any] = {name: getattr(here, name) for name in ("eval_sources", "prepare")}
    if all(source.format == "arrayrecord" for source in here.sources):
        # Packed rows are read as they lie.
        for name in ("num_workers", "num_packing_bins", "long_documents"):
            ignored[name] = getattr(here, name)
    there = dataclasses.replace(there, on_change=here.on_change, **ignored)
    if len(there.sources) != len(here.sources):
        rest = dataclasses.replace(there, sources=here.sources)
        counts = f"{len(there.sources)} data.sources, not {len(here.sources)}"
        return [counts, *differing_fields(rest, here, "data.")]
    rest = dataclasses.replace(there, sources=here.sources)
    fields = differing_fields(rest, here, "data.")
    for i, (a, b) in enumerate(zip(there.sources, here.sources, strict=True)):
        fields += differing_fields(a, b, f"data.sources[{i}].")
    return fields
