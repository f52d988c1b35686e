"""The programs that the device runs, each compiled once for a model and a shape.

Reading a row of tokens and choosing from its logits are two programs, so that the host may still
prepare the choice (a grammar's mask) while the row is being read. What is small is packed into one
array, as every array that is sent costs some microseconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dsjax.cache import LatentPool, Part, View
from dsjax.engine.state import ChunkShape
from dsjax.inference.sampler import (
    PACKED_SIZE,
    LogitChanges,
    LogProbs,
    SamplingArrays,
    log_probs,
    sample,
)
from dsjax.model import DeepSeekV2

# Entries of the table of pages that are set at a time.
TABLE_UPDATES = 256
# Prompt tokens whose logits are held at a time for their log-probabilities.
_LOGPROB_TOKENS = 128


class RowShape(NamedTuple):
    """The static sizes of a row of tokens, and of the rows of other lanes beside it.

    Attributes:
        num_decoding: sequences that read one token each, padding included.
        chunk: room for pieces of prompts after them, or None.
        num_wanted: tokens whose logits are wanted.
        prompt_logprobs: whether every token of the pieces gets its log-probability.
        num_rows: rows of these sizes, one a lane.
        is_first: whether every piece begins its prompt, so that none attends to the pool.
    """

    num_decoding: int
    chunk: ChunkShape | None
    num_wanted: int
    prompt_logprobs: bool = False
    num_rows: int = 1
    is_first: bool = False

    @property
    def num_integers(self) -> int:
        """Numbers that describe a row."""
        count = 3 * self.num_decoding + self.num_wanted
        if self.chunk is not None:
            count += 3 * self.chunk.num_sequences + self.chunk.row_tokens
            count += self.chunk.row_tokens * self.prompt_logprobs
        return count


class ChoiceShape(NamedTuple):
    """The static sizes of a choice of tokens.

    Attributes:
        num_wanted: rows of logits.
        draws: whether any token is drawn.
        limits: whether any draw is of the best tokens only.
        changes: whether logits are masked, biased or penalised first.
        logprobs: whether log-probabilities are wanted.
    """

    num_wanted: int
    draws: bool
    limits: bool
    changes: bool
    logprobs: bool


@dataclass(frozen=True)
class ModelKey:
    """What a program depends on of a model beside its arrays; hashable."""

    graphdef: nnx.GraphDef[DeepSeekV2]
    treedef: Any

    def model(self, leaves: tuple[jax.Array, ...]) -> DeepSeekV2:
        """Returns the model with its arrays."""
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, leaves))


def read_row(
    key: ModelKey,
    shape: RowShape,
    leaves: tuple[jax.Array, ...],
    pool: LatentPool,
    newest_S: jax.Array,
    table_SP: jax.Array,
    known_W: jax.Array,
    integers_RK: jax.Array,
) -> tuple[jax.Array, LogProbs | None, LatentPool]:
    """Reads a row of tokens of every lane.

    Args:
        key: the model without its arrays.
        shape: of the rows.
        leaves: the model's arrays.
        pool: donated.
        newest_S: int32, the newest token of each slot; the last slot is nobody's.
        table_SP: int32, pages of each slot.
        known_W: bool, ids that the tokenizer has.
        integers_RK: int32, of each row, in this order: slot, tokens cached and tokens read (0 or 1)
            of those that decode; the places wanted; slot, tokens cached and tokens read of the
            pieces; the pieces' tokens; with `prompt_logprobs`, the tokens that follow them.

    Returns:
        logits_MW of the places wanted, log-probabilities of the pieces' tokens, and the pool.
    """
    model = key.model(leaves)
    rows = rows_of(shape, newest_S, table_SP, integers_RK)
    hidden_TD, pool = model.extend_hidden(rows.tokens_RT.reshape(-1), pool, rows.view)
    logits_MW, logprobs = logits_of_rows(model, shape, rows, hidden_TD, known_W)
    return logits_MW, logprobs, pool


class RowArrays(NamedTuple):
    """The rows of tokens, as their packed array describes them.

    Attributes:
        tokens_RT: int32.
        view: their parts.
        wanted_RM: int32, places of each row whose logits are wanted.
        following_RT: int32, the tokens that follow those of the pieces, or None.
    """

    tokens_RT: jax.Array
    view: View
    wanted_RM: jax.Array
    following_RT: jax.Array | None


def rows_of(
    shape: RowShape, newest_S: jax.Array, table_SP: jax.Array, integers_RK: jax.Array
) -> RowArrays:
    """Unpacks what `read_row` is given of the rows."""
    split = _Split(integers_RK)
    parts, tokens = [], []
    count = shape.num_decoding
    slots_RB, lengths_RB, new_RB = split.next(count), split.next(count), split.next(count)
    wanted_RM = split.next(shape.num_wanted)

    def add_part(slots_RB: jax.Array, num_tokens: int, is_first: bool = False) -> None:
        lengths_B, new_B = lengths_RB.reshape(-1), new_RB.reshape(-1)
        table_BP = table_SP[slots_RB.reshape(-1)]
        parts.append(Part(table_BP, lengths_B, new_B, num_tokens, is_first))

    if count:
        add_part(slots_RB, 1)
        tokens.append(newest_S[slots_RB])
    following_RT = None
    if (chunk := shape.chunk) is not None:
        count = chunk.num_sequences
        slots_RB, lengths_RB, new_RB = split.next(count), split.next(count), split.next(count)
        add_part(slots_RB, chunk.num_tokens, shape.is_first)
        tokens.append(split.next(chunk.row_tokens))
        if shape.prompt_logprobs:
            following_RT = split.next(chunk.row_tokens)
    # A sequence without a next token (-1) may still be decoded with the others.
    tokens_RT = jnp.maximum(jnp.concatenate(tokens, axis=1), 0)
    return RowArrays(tokens_RT, View(tuple(parts), shape.num_rows), wanted_RM, following_RT)


def logits_of_rows(
    model: DeepSeekV2, shape: RowShape, rows: RowArrays, hidden_TD: jax.Array, known_W: jax.Array
) -> tuple[jax.Array, LogProbs | None]:
    """Returns logits_MW of the places wanted, and log-probabilities of the pieces' tokens."""
    hidden_RTD = hidden_TD.reshape(*rows.tokens_RT.shape, -1)

    def logits(hidden_RMD: jax.Array) -> jax.Array:
        with jax.named_scope("head"):
            logits_RMW = model.lm_head.logits(model.norm(hidden_RMD))
        # Each device chooses from all of the vocabulary.
        logits_RMW = model.options.rules.constrain(logits_RMW, "batch", None, None)
        return logits_RMW.reshape(-1, logits_RMW.shape[-1])

    logprobs = None
    if rows.following_RT is not None:
        size = rows.following_RT.shape[1]

        def of_block(block: tuple[jax.Array, jax.Array]) -> LogProbs:
            hidden_RMD, following_RM = (jnp.swapaxes(x, 0, 1) for x in block)
            found = log_probs(logits(hidden_RMD), following_RM.reshape(-1), known_W)
            return LogProbs(*(x.reshape(*following_RM.shape, *x.shape[1:]) for x in found))

        pieces_RTD = hidden_RTD[:, shape.num_decoding :]
        blocks = (_in_blocks(pieces_RTD), _in_blocks(rows.following_RT))
        found = jax.lax.map(of_block, blocks)
        logprobs = LogProbs(*(_in_rows(x, size) for x in found))
    wanted_RMD = jnp.take_along_axis(hidden_RTD, rows.wanted_RM[..., None], axis=1)
    return logits(wanted_RMD), logprobs


def choose_tokens(
    shape: ChoiceShape,
    logits_MW: jax.Array,
    newest_S: jax.Array,
    known_W: jax.Array,
    packed_MK: jax.Array,
    counts_SW: jax.Array | None,
    changes: tuple[jax.Array, jax.Array, jax.Array] | None,
) -> tuple[jax.Array, LogProbs | None, jax.Array, jax.Array | None]:
    """Chooses the next tokens.

    Args:
        shape: what is asked for.
        logits_MW: of `read_row`.
        newest_S: donated.
        known_W: bool, ids that the tokenizer has.
        packed_MK: uint32, rows of `sampler.pack`, then the slot.
        counts_SW: donated; see `LogitChanges`.
        changes: the other arrays of `LogitChanges`.

    Returns:
        tokens_M, their log-probabilities, and the two arrays by slot.
    """
    slots_M = packed_MK[:, PACKED_SIZE].astype(jnp.int32)
    sampling = changed = None
    if shape.draws or shape.changes:
        sampling = SamplingArrays.unpack(packed_MK[:, :PACKED_SIZE])
    if shape.changes:
        assert counts_SW is not None
        assert changes is not None
        changed = LogitChanges(counts_SW[slots_M], *changes)
    tokens_M = sample(
        logits_MW, sampling, changed, known_W, limited=shape.limits, drawn=shape.draws
    )
    newest_S = newest_S.at[slots_M].set(tokens_M)
    if shape.changes:
        assert counts_SW is not None
        counts_SW = counts_SW.at[slots_M, jnp.maximum(tokens_M, 0)].add(2)
    logprobs = log_probs(logits_MW, tokens_M, known_W) if shape.logprobs else None
    return tokens_M, logprobs, newest_S, counts_SW


def set_pages(table_SP: jax.Array, entries: jax.Array) -> jax.Array:
    """Sets entries of the table: int32 [3, 256] of slots, columns and pages."""
    slots, columns, pages = entries
    return table_SP.at[slots, columns].set(pages, mode="drop")


def set_counts(counts_SW: jax.Array, slot: jax.Array, row_W: jax.Array) -> jax.Array:
    """Sets a slot's counts of tokens."""
    return counts_SW.at[slot].set(row_W)


class _Split:
    """Takes consecutive parts of every row of an array."""

    def __init__(self, array_RK: jax.Array) -> None:
        self._array_RK, self._at = array_RK, 0

    def next(self, count: int) -> jax.Array:
        """Returns the next `count` numbers of every row."""
        self._at += count
        return self._array_RK[:, self._at - count : self._at]


def _in_blocks(array_RTX: jax.Array) -> jax.Array:
    """Cuts rows of tokens into [blocks, tokens of a block, rows, X]."""
    size = min(_LOGPROB_TOKENS, array_RTX.shape[1])
    array_TRX = jnp.swapaxes(array_RTX, 0, 1)
    padding = [(0, -array_TRX.shape[0] % size)] + [(0, 0)] * (array_TRX.ndim - 1)
    return jnp.pad(array_TRX, padding).reshape(-1, size, *array_TRX.shape[1:])


def _in_rows(blocks: jax.Array, size: int) -> jax.Array:
    """Joins [blocks, rows, tokens of a block, X] to the first `size` tokens of each row, [T, X]."""
    joined = jnp.swapaxes(blocks, 0, 1).reshape(blocks.shape[1], -1, *blocks.shape[3:])
    return joined[:, :size].reshape(-1, *blocks.shape[3:])
