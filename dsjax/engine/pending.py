"""What a step gives, still on the device."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any, NamedTuple

import jax
import numpy as np

from dsjax.engine.programs import RowShape
from dsjax.inference.sampler import LogProbs


class Chosen(NamedTuple):
    """What the device chooses, on its way to the host."""

    tokens_M: jax.Array
    logprobs: LogProbs | None

    def on_host(self) -> tuple[np.ndarray, LogProbs | None]:
        """Waits for the device and returns NumPy arrays."""
        return jax.device_get((self.tokens_M, self.logprobs))


class Row(NamedTuple):
    """Rows that have been launched: their logits, and log-probabilities of the prompts' tokens."""

    logits_MW: jax.Array
    prompt_logprobs: LogProbs | None


class Reading(NamedTuple):
    """Rows that are being read: their shape, and what they give once they are launched."""

    shape: RowShape
    row: Future[Row]

    def place(self, lane: int, index: int) -> int:
        """Returns where the logits of a lane's sample lie."""
        return lane * self.shape.num_wanted + index

    def prompt_place(self, lane: int, index: int) -> int:
        """Returns where the log-probabilities of a lane's piece begin."""
        assert self.shape.chunk is not None
        return lane * self.shape.chunk.row_tokens + index * self.shape.chunk.num_tokens


def copy_to_host(arrays: Any) -> None:
    """Begins to copy what the host will ask for."""
    for leaf in jax.tree.leaves(arrays):
        leaf.copy_to_host_async()
