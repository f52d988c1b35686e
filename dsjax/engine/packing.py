"""What the host sends with a step, as few small arrays; see `programs` for their layout."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Listing
from dataclasses import dataclass

import jax
import numpy as np

from dsjax.engine.programs import ChoiceShape, RowShape
from dsjax.engine.state import ChunkShape, Piece, Sequence, Step
from dsjax.inference.sampler import PACKED_SIZE, LogitChanges


@dataclass(frozen=True)
class Choice:
    """How one sequence gets its next token.

    Attributes:
        packed: of `sampler.pack`.
        draws: whether it is drawn.
        limits: whether of the best tokens only.
        changes: whether its logits are changed first.
        logprobs: whether its log-probability is wanted.
        allowed: uint32 bits of the tokens that may be chosen, or None for all.
        bias: ids and numbers to be added to their logits, or None.
    """

    packed: np.ndarray
    draws: bool
    limits: bool
    changes: bool
    logprobs: bool
    allowed: np.ndarray | None = None
    bias: tuple[np.ndarray, np.ndarray] | None = None


def pack_rows(shape: RowShape, steps: Listing[Step], nobody: int) -> np.ndarray:
    """Returns the integers that `programs.read_row` takes.

    Args:
        shape: of the rows.
        steps: what is read, of each lane.
        nobody: the slot of padding.
    """
    return np.stack([_pack_row(shape, step, nobody) for step in steps])


def _pack_row(shape: RowShape, step: Step, nobody: int) -> np.ndarray:
    count = shape.num_decoding
    decoding = np.zeros((3, count), np.int32)
    decoding[0] = nobody
    size = len(step.decoding)
    decoding[0, :size] = [_slot(sequence) for sequence in step.decoding]
    decoding[1, :size] = [sequence.num_cached - 1 for sequence in step.decoding]
    decoding[2, :size] = 1
    wanted_M = np.zeros(shape.num_wanted, np.int32)
    wanted_M[:size] = np.arange(size)
    packed = [decoding.reshape(-1), wanted_M]
    if shape.chunk is not None:
        packed += _pack_pieces(shape, shape.chunk, step.pieces, nobody)
        place = size
        for index, piece in enumerate(step.pieces):
            if piece.sequence.on_device:  # its next token is chosen from this step
                wanted_M[place] = count + index * shape.chunk.num_tokens + piece.num_tokens - 1
                place += 1
    return np.concatenate(packed)


def _pack_pieces(
    shape: RowShape, chunk: ChunkShape, pieces: Listing[Piece], nobody: int
) -> list[np.ndarray]:
    described = np.zeros((3, chunk.num_sequences), np.int32)
    described[0] = nobody
    tokens_BT = np.zeros((2, chunk.num_sequences, chunk.num_tokens), np.int32)
    for index, piece in enumerate(pieces):
        end = piece.start + piece.num_tokens
        described[:, index] = _slot(piece.sequence), piece.start, piece.num_tokens
        tokens_BT[0, index, : piece.num_tokens] = piece.sequence.tokens[piece.start : end]
        following = piece.sequence.tokens[piece.start + 1 : end + 1]
        tokens_BT[1, index, : len(following)] = following
    kinds = 2 if shape.prompt_logprobs else 1
    return [described.reshape(-1), tokens_BT[:kinds].reshape(-1)]


def pack_choices(
    shape: ChoiceShape,
    sequences: Listing[Sequence],
    choices: Listing[Choice],
    places: Listing[int],
    nobody: int,
) -> np.ndarray:
    """Returns the rows that `programs.choose_tokens` takes; those of nobody are thrown away."""
    packed_MK = np.zeros((shape.num_wanted, PACKED_SIZE + 1), np.uint32)
    packed_MK[:, PACKED_SIZE] = nobody
    if sequences:
        packed_MK[places, PACKED_SIZE] = [_slot(sequence) for sequence in sequences]
        if shape.draws or shape.changes:
            packed = np.concatenate([choice.packed for choice in choices])
            packed_MK[places, :PACKED_SIZE] = packed.reshape(-1, PACKED_SIZE)
    return packed_MK


def pack_changes(
    size: int, vocab_size: int, choices: Listing[Choice], places: Listing[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns what changes logits: bits of allowed tokens, tokens with a bias, and their biases."""
    allowed_MV, ids_MK, bias_MK = LogitChanges.host_arrays(size, vocab_size)
    for at, choice in zip(places, choices, strict=True):
        if choice.allowed is not None:
            allowed_MV[at] = choice.allowed
        if choice.bias is not None:
            ids, numbers = choice.bias
            ids_MK[at, : len(ids)] = ids
            bias_MK[at, : len(ids)] = numbers
    return allowed_MV, ids_MK, bias_MK


class LastSent:
    """Sends arrays to the device, each only where it differs from the one before."""

    def __init__(self, put: Callable[[np.ndarray], jax.Array]) -> None:
        self._put = put
        self._sent: tuple[np.ndarray, jax.Array] | None = None

    def __call__(self, array: np.ndarray) -> jax.Array:
        """Returns the array on the device."""
        if self._sent is None or not np.array_equal(self._sent[0], array):
            self._sent = array, self._put(array)
        return self._sent[1]


def _slot(sequence: Sequence) -> int:
    assert sequence.slot is not None
    return sequence.slot
