"""Choosing the next token: greedy, temperature, top-k and top-p, each sequence for itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import jax
import jax.numpy as jnp

from dsjax.config.model import require


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and when a text ends.

    Attributes:
        max_tokens: tokens generated at most.
        temperature: 0 takes the best token; otherwise logits are divided by it.
        top_k: keep the best so many tokens; 0 keeps all.
        top_p: keep the smallest set of best tokens with this probability; 1 keeps all.
        seed: of the draws; a sequence's draws depend on it and on nothing else of the batch.
        stop: strings that end a text; they are not part of it. One string, or None, may be given.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("max_tokens", "top_k", "seed"):
            value = getattr(self, name)
            whole = isinstance(value, Integral) and not isinstance(value, bool)
            require(whole, name, value, "must be a whole number")
        for name in ("temperature", "top_p"):
            value = getattr(self, name)
            number = isinstance(value, Real) and not isinstance(value, bool)
            require(number, name, value, "must be a number")
        object.__setattr__(self, "stop", _stops(self.stop))
        require(self.max_tokens > 0, "max_tokens", self.max_tokens, "must be positive")
        require(
            0 <= self.temperature < float("inf"),
            "temperature",
            self.temperature,
            "must be finite and not negative",
        )
        require(0 <= self.top_k < 2**31, "top_k", self.top_k, "must be in [0, 2**31)")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "must be in (0, 1]")
        require(0 <= self.seed < 2**32, "seed", self.seed, "must be in [0, 2**32)")
        require("" not in self.stop, "stop", self.stop, "must not hold an empty string")


def _stops(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Returns stop strings as a tuple; a string is one of them, not its characters."""
    if stop is None:
        return ()
    if isinstance(stop, str):
        return (stop,)
    listed = isinstance(stop, Sequence) and all(isinstance(one, str) for one in stop)
    require(listed, "stop", stop, "must be a string or a list of strings")
    return tuple(stop)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingArrays:
    """The samplings of a batch: keys uint32 [B, 2], temperature_B, top_k_B, top_p_B."""

    keys: jax.Array
    temperature_B: jax.Array
    top_k_B: jax.Array
    top_p_B: jax.Array

    @classmethod
    def of(cls, samplings: list[Sampling]) -> SamplingArrays:
        """Lays samplings out as arrays."""
        return cls(
            keys=jax.vmap(jax.random.PRNGKey)(jnp.array([s.seed for s in samplings], jnp.uint32)),
            temperature_B=jnp.array([s.temperature for s in samplings], jnp.float32),
            top_k_B=jnp.array([s.top_k for s in samplings], jnp.int32),
            top_p_B=jnp.array([s.top_p for s in samplings], jnp.float32),
        )


def sample(
    logits_BW: jax.Array,
    sampling: SamplingArrays,
    index: jax.Array,
    num_ids: jax.Array | None = None,
) -> jax.Array:
    """Chooses the next token of every sequence.

    Args:
        logits_BW: float32.
        sampling: how, for each sequence.
        index: int32 scalar, tokens generated before this one.
        num_ids: int32 scalar, ids that the tokenizer has; those past it are never chosen. None
            allows all.

    Returns:
        tokens_B: int32; -1 where a logit is NaN or infinite, so that no token means anything.
    """
    if num_ids is not None:
        # Models round their tables up; the rows past the tokenizer's ids were never trained.
        known_W = jnp.arange(logits_BW.shape[-1]) < num_ids
        finite_B = jnp.all(jnp.isfinite(logits_BW) | ~known_W, axis=-1)
        logits_BW = jnp.where(known_W, logits_BW, -jnp.inf)
    else:
        finite_B = jnp.all(jnp.isfinite(logits_BW), axis=-1)
    greedy_B = jnp.argmax(logits_BW, axis=-1).astype(jnp.int32)
    temperature_B1 = jnp.where(sampling.temperature_B > 0, sampling.temperature_B, 1)[:, None]
    scaled_BW = logits_BW / temperature_B1
    # Sorting the vocabulary is most of the work here, so it is done only where it is asked for.
    limited = jnp.any((sampling.top_k_B > 0) | (sampling.top_p_B < 1))
    kept_BW = jax.lax.cond(
        limited,
        _keep_best,
        lambda logits, *_: logits,
        scaled_BW,
        sampling.top_k_B,
        sampling.top_p_B,
    )
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(sampling.keys, index)
    drawn_B = jax.vmap(jax.random.categorical)(keys, kept_BW).astype(jnp.int32)
    chosen_B = jnp.where(sampling.temperature_B > 0, drawn_B, greedy_B)
    return jnp.where(finite_B, chosen_B, -1)


def _keep_best(logits_BW: jax.Array, top_k_B: jax.Array, top_p_B: jax.Array) -> jax.Array:
    """Sets all but the tokens of top-k and top-p to -inf; the best token always stays."""
    order_BW = jnp.argsort(logits_BW, axis=-1, descending=True)
    sorted_BW = jnp.take_along_axis(logits_BW, order_BW, axis=-1)
    rank_W = jnp.arange(logits_BW.shape[-1])
    by_rank_BW = (top_k_B[:, None] == 0) | (rank_W < top_k_B[:, None])
    # top-p is of what top-k left
    probability_BW = jax.nn.softmax(jnp.where(by_rank_BW, sorted_BW, -jnp.inf), axis=-1)
    before_BW = jnp.cumsum(probability_BW, axis=-1) - probability_BW
    kept_BW = by_rank_BW & ((before_BW < top_p_B[:, None]) | (rank_W == 0))
    place_BW = jnp.argsort(order_BW, axis=-1)
    return jnp.where(jnp.take_along_axis(kept_BW, place_BW, axis=-1), logits_BW, -jnp.inf)
