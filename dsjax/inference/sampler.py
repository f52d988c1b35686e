"""Choosing the next token on the device, each sequence for itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.inference.sampling import MAX_BIASED_TOKENS, MAX_LOGPROBS, Sampling


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingArrays:
    """How the tokens of a batch are chosen; see `Sampling`.

    Attributes:
        keys: uint32 [B, 2].
        index_B: int32, tokens generated before this one.
        top_k_B: int32.
        temperature_B: float32, as all that follow.
        top_p_B: what it is in `Sampling`.
        min_p_B: likewise.
        repetition_B: likewise.
        presence_B: likewise.
        frequency_B: likewise.
    """

    keys: jax.Array
    index_B: jax.Array
    top_k_B: jax.Array
    temperature_B: jax.Array
    top_p_B: jax.Array
    min_p_B: jax.Array
    repetition_B: jax.Array
    presence_B: jax.Array
    frequency_B: jax.Array

    @classmethod
    def unpack(cls, packed_BK: jax.Array) -> SamplingArrays:
        """Returns the arrays of rows that `pack` made."""
        numbers = jax.lax.bitcast_convert_type(packed_BK[:, 4:], jnp.float32)
        whole = jax.lax.bitcast_convert_type(packed_BK[:, 2:4], jnp.int32)
        return cls(packed_BK[:, :2], *whole.T, *numbers.T)


# What `pack` returns for one text.
PACKED_SIZE = 10
PACKED_INDEX = 2  # where the number of tokens before the next one stands


def pack(sampling: Sampling, key: np.ndarray, index: int) -> np.ndarray:
    """Returns how a text's next token is chosen, as uint32 [10]: one small copy a batch.

    Args:
        sampling: how.
        key: of `Sampling.key`.
        index: tokens generated before this one.
    """
    packed = np.empty(PACKED_SIZE, np.uint32)
    packed[:2] = key
    packed[PACKED_INDEX : PACKED_INDEX + 2] = index, sampling.top_k
    packed[4:].view(np.float32)[:] = (
        sampling.temperature,
        sampling.top_p,
        sampling.min_p,
        sampling.repetition_penalty,
        sampling.presence_penalty,
        sampling.frequency_penalty,
    )
    return packed


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LogitChanges:
    """What changes logits token by token; see `Sampling`.

    Attributes:
        counts_BW: int32, how often each token is in the text so far, doubled, and one more where
            it is in the prompt.
        allowed_BV: uint32, a bit for each token, the lowest first; V is W / 32, rounded up.
        bias_ids_BK: int32, tokens with a bias; W and more are none.
        bias_BK: float32.
    """

    counts_BW: jax.Array
    allowed_BV: jax.Array
    bias_ids_BK: jax.Array
    bias_BK: jax.Array

    @staticmethod
    def host_arrays(size: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns `allowed_BV`, `bias_ids_BK` and `bias_BK` that change nothing."""
        return (
            np.full((size, -(-vocab_size // 32)), 0xFFFFFFFF, np.uint32),
            np.full((size, MAX_BIASED_TOKENS), vocab_size, np.int32),
            np.zeros((size, MAX_BIASED_TOKENS), np.float32),
        )


def allowed_bits(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """Returns a row of `LogitChanges.allowed_BV`.

    Args:
        tokens: ids, or bool [W].
        vocab_size: W.
    """
    allowed_W = np.zeros(-(-vocab_size // 32) * 32, bool)
    if tokens.dtype == bool:
        allowed_W[: tokens.size] = tokens
    else:
        allowed_W[tokens] = True
    return np.packbits(allowed_W, bitorder="little").view("<u4").astype(np.uint32)


class LogProbs(NamedTuple):
    """Log-probabilities of a batch, the model's own: float32, and the tokens that they are of.

    Attributes:
        chosen_B: of the token chosen.
        best_BK: of the best 20, the best first.
        best_ids_BK: int32.
    """

    chosen_B: jax.Array
    best_BK: jax.Array
    best_ids_BK: jax.Array


def sample(
    logits_BW: jax.Array,
    sampling: SamplingArrays | None = None,
    changes: LogitChanges | None = None,
    known_W: jax.Array | None = None,
    *,
    drawn: bool = True,
    limited: bool = True,
) -> jax.Array:
    """Chooses the next token of every sequence.

    Args:
        logits_BW: float32.
        sampling: how, for each sequence; None takes the best token of all.
        changes: what changes the logits first; None changes nothing.
        known_W: bool, ids that the tokenizer has; others are never chosen. None knows all.
        drawn: whether any sequence has a temperature.
        limited: whether any sequence has a top-k, top-p or min-p, which cost most of the time.

    Returns:
        tokens_B: int32; -1 where a logit is NaN or infinite, so that no token means anything.
    """
    # Models round their tables up; the rows past the tokenizer's ids were never trained.
    known_W = jnp.ones(logits_BW.shape[-1], bool) if known_W is None else known_W
    finite_B = jnp.all(jnp.isfinite(logits_BW) | ~known_W, axis=-1)
    logits_BW = jnp.where(known_W, logits_BW, -jnp.inf)
    if changes is not None:
        assert sampling is not None
        logits_BW = _changed(logits_BW, sampling, changes)
    chosen_B = jnp.argmax(logits_BW, axis=-1).astype(jnp.int32)
    if sampling is not None and drawn:
        drawn_B = _drawn(logits_BW, sampling, limited)
        chosen_B = jnp.where(sampling.temperature_B > 0, drawn_B, chosen_B)
    return jnp.where(finite_B, chosen_B, -1)


def log_probs(logits_BW: jax.Array, tokens_B: jax.Array, known_W: jax.Array | None) -> LogProbs:
    """Returns the log-probabilities of tokens and of the best ones.

    Args:
        logits_BW: float32.
        tokens_B: int32, tokens chosen, or those that follow in a prompt.
        known_W: as in `sample`.
    """
    if known_W is not None:
        logits_BW = jnp.where(known_W, logits_BW, -jnp.inf)
    logprobs_BW = jax.nn.log_softmax(logits_BW, axis=-1)
    chosen_B1 = jnp.take_along_axis(logprobs_BW, jnp.maximum(tokens_B, 0)[:, None], axis=-1)
    best = jax.lax.top_k(logprobs_BW, min(MAX_LOGPROBS, logits_BW.shape[-1]))
    return LogProbs(chosen_B1[:, 0], best[0], best[1].astype(jnp.int32))


def _changed(logits_BW: jax.Array, sampling: SamplingArrays, changes: LogitChanges) -> jax.Array:
    """Returns logits after mask, bias and penalties."""
    rows_B1 = jnp.arange(logits_BW.shape[0])[:, None]
    vocab_size = logits_BW.shape[-1]
    bits_BVb = changes.allowed_BV[:, :, None] >> jnp.arange(32, dtype=jnp.uint32) & 1
    allowed_BW = bits_BVb.reshape(logits_BW.shape[0], -1)[:, :vocab_size] == 1
    logits_BW = jnp.where(allowed_BW, logits_BW, -jnp.inf)
    logits_BW = logits_BW.at[rows_B1, changes.bias_ids_BK].add(changes.bias_BK, mode="drop")
    repetition_B1 = sampling.repetition_B[:, None]
    repeated_BW = jnp.where(logits_BW > 0, logits_BW / repetition_B1, logits_BW * repetition_B1)
    logits_BW = jnp.where(changes.counts_BW > 0, repeated_BW, logits_BW)
    in_text_BW = changes.counts_BW >> 1
    logits_BW -= sampling.frequency_B[:, None] * in_text_BW
    return logits_BW - sampling.presence_B[:, None] * (in_text_BW > 0)


def _drawn(logits_BW: jax.Array, sampling: SamplingArrays, limited: bool) -> jax.Array:
    """Draws a token of each row after temperature, top-k, top-p and min-p."""
    temperature_B1 = jnp.where(sampling.temperature_B > 0, sampling.temperature_B, 1)[:, None]
    kept_BW = logits_BW / temperature_B1
    if limited:
        kept_BW = _keep_best(kept_BW, sampling.top_k_B, sampling.top_p_B, sampling.min_p_B)
    # One number a token (Gumbel's), so that a draw does not depend on how a sum is split up.
    keys = jax.vmap(jax.random.fold_in)(sampling.keys, sampling.index_B)
    return jax.vmap(jax.random.categorical)(keys, kept_BW).astype(jnp.int32)


def _keep_best(
    logits_BW: jax.Array, top_k_B: jax.Array, top_p_B: jax.Array, min_p_B: jax.Array
) -> jax.Array:
    """Sets all but the tokens of top-k, top-p and min-p to -inf; the best token always stays.

    Nothing is sorted: the least logit that is kept is found bit by bit, 32 passes over the logits
    that count (top-k) or weigh (top-p) what lies above.
    """
    order_BW = _ordered(logits_BW)
    size = logits_BW.shape[-1]
    count_B = jnp.where(top_k_B > 0, jnp.minimum(top_k_B, size), size)

    def counted(threshold_B: jax.Array) -> jax.Array:
        return jnp.sum(order_BW >= threshold_B[:, None], axis=-1) >= count_B

    kept_BW = _first(order_BW, _largest(counted, count_B.shape), count_B)
    # top-p is of what top-k left
    probability_BW = jax.nn.softmax(jnp.where(kept_BW, logits_BW, -jnp.inf), axis=-1)

    def mass(above_BW: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(above_BW, probability_BW, 0), axis=-1)

    def weighed(threshold_B: jax.Array) -> jax.Array:
        return mass(order_BW >= threshold_B[:, None]) >= top_p_B

    threshold_B = _largest(weighed, count_B.shape)
    at_BW = kept_BW & (order_BW == threshold_B[:, None])
    each_B = jnp.max(jnp.where(at_BW, probability_BW, 0), axis=-1)
    above_BW = kept_BW & (order_BW > threshold_B[:, None])
    wanted_B = (top_p_B - mass(above_BW)) / jnp.where(each_B > 0, each_B, 1)
    # Tokens that are equally good: as many as it takes, at least one.
    ties_B = jnp.maximum(jnp.ceil(jnp.clip(wanted_B, 0, size)), 1).astype(jnp.int32)
    number_B = jnp.sum(above_BW, axis=-1) + ties_B
    kept_p_BW = kept_BW & _first(order_BW, threshold_B, number_B)
    kept_BW = jnp.where((top_p_B < 1)[:, None], kept_p_BW, kept_BW)
    best_B1 = jnp.max(logits_BW, axis=-1, keepdims=True)
    kept_BW &= logits_BW >= best_B1 + jnp.log(min_p_B)[:, None]
    return jnp.where(kept_BW, logits_BW, -jnp.inf)


def _ordered(x: jax.Array) -> jax.Array:
    """Returns float32 numbers as uint32 of the same order."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    negative = bits >> 31 == 1
    return jnp.where(negative, ~bits, bits | jnp.uint32(0x80000000))


def _largest(holds, shape: tuple[int, ...]) -> jax.Array:  # type: ignore[no-untyped-def]
    """Returns the largest uint32 for which `holds`, which is true up to some number; 0 if none."""

    def set_bit(index: jax.Array, found_B: jax.Array) -> jax.Array:
        trial_B = found_B | (jnp.uint32(1) << (31 - index).astype(jnp.uint32))
        return jnp.where(holds(trial_B), trial_B, found_B)

    return jax.lax.fori_loop(0, 32, set_bit, jnp.zeros(shape, jnp.uint32))


def _first(order_BW: jax.Array, threshold_B: jax.Array, count_B: jax.Array) -> jax.Array:
    """Returns which numbers lie above a threshold, or on it and among the first `count_B`."""
    above_BW = order_BW > threshold_B[:, None]
    at_BW = order_BW == threshold_B[:, None]
    left_B = count_B - jnp.sum(above_BW, axis=-1)
    return above_BW | (at_BW & (jnp.cumsum(at_BW, axis=-1) <= left_B[:, None]))
