"""Routing tokens to experts: affinities, and the choice of the best (§2.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from dsjax.config import MoEConfig
from dsjax.layers.linear import Linear
from dsjax.layers.moe.balance import (
    Dropping,
    balance_losses,
    by_group,
    keep_within_capacity,
)
from dsjax.layers.options import LayerOptions

# Comparisons of an expert's affinity with another's up to which `compare_few` does without a sort:
# 256 tokens over V2's 160 experts.
MOST_COMPARED = 256 * 160 * 160
# Tokens up to which the width is divided into so many parts: a product of V2-Lite's 16 rows took
# 3.3 us on an H200 instead of 6.
_FEW_TOKENS, _PARTS = 256, 8


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routing:
    """Where each token goes.

    Attributes:
        gates_BTK: float32 weight of each chosen expert; 0 for padding and where dropped.
        indices_BTK: int32 chosen experts; `num_experts` for padding and where dropped.
    """

    gates_BTK: jax.Array
    indices_BTK: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RouterStats:
    """What training reads off a router.

    Attributes:
        expert: unweighted expert-level balance loss, float32 scalar (eq. 23 to 25).
        device: unweighted device-level balance loss (eq. 26 to 28).
        communication: unweighted communication balance loss (eq. 29 to 31).
        load_E: float32, assignments of each expert before dropping.
        dropped: float32 scalar, share of all assignments that were dropped.
        entropy: float32 scalar, in nats: of a token's affinities over all experts, mean over the
            tokens. log(num_experts) where the router prefers none, 0 where it wants one alone.
    """

    expert: jax.Array
    device: jax.Array
    communication: jax.Array
    load_E: jax.Array
    dropped: jax.Array
    entropy: jax.Array


def router_logits(
    x_BTD: jax.Array, weight_DE: jax.Array, *, implementation: str = "float32"
) -> jax.Array:
    """Multiplies tokens by the experts' centroids (the exponents of eq. 22) in float32.

    Args:
        x_BTD: bfloat16 or float32.
        weight_DE: bfloat16 or float32.
        implementation: "float32", or "bfloat16_terms" for bfloat16 tokens.

    Returns:
        logits_BTE, float32.

    Raises:
        ValueError: an unknown implementation, or tokens that it cannot take.
    """
    if implementation == "bfloat16_terms":
        if x_BTD.dtype != jnp.bfloat16:
            raise ValueError(
                f"x_BTD: dtype {x_BTD.dtype} must be bfloat16 for implementation 'bfloat16_terms'"
            )
        return _logits_of_bfloat16(x_BTD, weight_DE)
    if implementation != "float32":
        raise ValueError(
            f"implementation: {implementation!r} must be 'float32' or 'bfloat16_terms'"
        )
    return jnp.einsum(
        "BTD,DE->BTE",
        x_BTD.astype(jnp.float32),
        weight_DE.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )


def _bfloat16_terms(array: jax.Array, count: int, axis: int) -> jax.Array:
    """Splits values into `count` bfloat16 terms, largest first.

    Three sum to a float32 exactly, where it is of normal size.
    """
    if array.dtype == jnp.bfloat16:
        return jnp.expand_dims(array, axis)
    terms = []
    for _ in range(count):
        # Not astype, there and back: the compiler may leave such a pair of casts out.
        term = jax.lax.reduce_precision(array, exponent_bits=8, mantissa_bits=7)
        array -= term
        terms.append(term.astype(jnp.bfloat16))
    return jnp.stack(terms, axis)


@jax.custom_vjp
def _logits_of_bfloat16(x_BTD: jax.Array, weight_DE: jax.Array) -> jax.Array:
    """As float32 products, by products of bfloat16 terms (letters S, P) with float32 sums.

    Matrix units take float32 at a small part of their rate; a bfloat16 x needs no splitting. The
    width is divided into parts (P) where tokens are few: one block of a GPU would walk through it
    while the others wait.
    """
    weight_DSE = _bfloat16_terms(weight_DE, 3, axis=1)
    few = math.prod(x_BTD.shape[:2]) <= _FEW_TOKENS and x_BTD.shape[-1] % _PARTS == 0
    parts = _PARTS if few else 1
    logits_PBTSE = jnp.einsum(
        "BTPD,PDSE->PBTSE",
        x_BTD.reshape(*x_BTD.shape[:2], parts, -1),
        weight_DSE.reshape(parts, -1, *weight_DSE.shape[1:]),
        preferred_element_type=jnp.float32,
    )
    return jnp.sum(logits_PBTSE, axis=(0, -2))


def _logits_forward(
    x_BTD: jax.Array, weight_DE: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _logits_of_bfloat16(x_BTD, weight_DE), (x_BTD, weight_DE)


def _logits_backward(
    kept: tuple[jax.Array, jax.Array], d_logits_BTE: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x_BTD, weight_DE = kept
    d_logits_BTSE = _bfloat16_terms(d_logits_BTE, 3, axis=-2)
    d_weight_DSE = jnp.einsum(
        "BTD,BTSE->DSE", x_BTD, d_logits_BTSE, preferred_element_type=jnp.float32
    )
    # d_x is rounded to bfloat16, so two terms of each side will do, without their last product.
    weight_DSE = _bfloat16_terms(weight_DE, 2, axis=1)
    pairs = [(0, 0), (1, 0)] + [(0, 1)] * (weight_DSE.shape[1] - 1)
    of_d, of_weight = (list(side) for side in zip(*pairs, strict=True))
    d_x_BTD = jnp.einsum(
        "BTPE,DPE->BTD",
        jnp.stack([d_logits_BTSE[..., term, :] for term in of_d], axis=-2),
        jnp.stack([weight_DSE[:, term] for term in of_weight], axis=1),
        preferred_element_type=x_BTD.dtype,
    )
    return d_x_BTD, jnp.sum(d_weight_DSE, axis=1).astype(weight_DE.dtype)


_logits_of_bfloat16.defvjp(_logits_forward, _logits_backward)


class Router(nnx.Module):
    """Softmax affinities and the choice of the experts, in float32 whatever the compute type."""

    def __init__(self, config: MoEConfig, hidden_dim: int, options: LayerOptions, rngs: nnx.Rngs):
        shape, dims = (hidden_dim, config.num_experts), ("param_embed", "router_experts")
        self.gate = Linear(shape, dims, options, rngs)
        self.config = config
        self.implementation = options.kernels.router
        self.compare_few = options.kernels.compare_few
        self.rules = options.rules

    def __call__(
        self, x_BTD: jax.Array, mask_BT: jax.Array | None, dropping: Dropping | None
    ) -> tuple[Routing, RouterStats]:
        """Routes tokens.

        Args:
            x_BTD: normalised residual stream.
            mask_BT: bool, False for padding, which goes to no expert and counts in no loss and
                load; None for none.
            dropping: the token-dropping option, or None to keep all.
        """
        logits_BTE = router_logits(x_BTD, self.gate.stored(), implementation=self.implementation)
        scores_BTE = jax.nn.softmax(logits_BTE, axis=-1)
        gates_BTK, indices_BTK = choose_experts(scores_BTE, self.config, compare=self.compare_few)
        masked = mask_BT is not None
        mask_BT = mask_BT if mask_BT is not None else jnp.ones(x_BTD.shape[:2], bool)
        expert, device, communication, load_E = balance_losses(
            scores_BTE, indices_BTK, mask_BT, self.config
        )
        entropy = mean_entropy(logits_BTE, scores_BTE, mask_BT)
        dropped = jnp.zeros((), jnp.float32)
        keep_BTK = jnp.broadcast_to(mask_BT[..., None], indices_BTK.shape)
        if dropping is not None:
            real = jnp.sum(keep_BTK, dtype=jnp.float32)
            keep_BTK &= keep_within_capacity(
                scores_BTE, indices_BTK, mask_BT, self.config, dropping, self.rules
            )
            kept = jnp.sum(keep_BTK, dtype=jnp.float32)
            dropped = (real - kept) / jnp.maximum(real, 1)  # of nothing but padding, nothing
        if dropping is not None or masked:
            gates_BTK = jnp.where(keep_BTK, gates_BTK, 0)
            indices_BTK = jnp.where(keep_BTK, indices_BTK, self.config.num_experts)
        routing = Routing(gates_BTK, indices_BTK)
        return routing, RouterStats(expert, device, communication, load_E, dropped, entropy)


def mean_entropy(logits_BTE: jax.Array, scores_BTE: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Returns the mean entropy of the tokens' affinities in nats; it has no gradient.

    Where nobody asks for it, it is not part of the compiled program.

    Args:
        logits_BTE: float32.
        scores_BTE: float32, their softmax over the experts.
        mask_BT: bool, False for padding, which does not count.
    """
    logits_BTE, scores_BTE = jax.lax.stop_gradient((logits_BTE, scores_BTE))
    log_sum_BT = jax.nn.logsumexp(logits_BTE, axis=-1)
    entropy_BT = log_sum_BT - jnp.sum(scores_BTE * logits_BTE, axis=-1)
    tokens = jnp.maximum(jnp.sum(mask_BT, dtype=jnp.float32), 1)
    return jnp.sum(jnp.where(mask_BT, entropy_BT, 0)) / tokens


def choose_experts(
    scores_BTE: jax.Array, config: MoEConfig, *, compare: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Chooses each token's experts by affinity (eq. 21 and 22; device-limited, §2.2.2).

    Args:
        scores_BTE: float32 affinities, softmax over the experts.
        config: says how many and from which groups.
        compare: compare each expert with each instead of sorting, where tokens are few.

    Returns:
        gates_BTK float32 and indices_BTK int32, best first.
    """
    selectable_BTE = scores_BTE
    if config.routing == "group_limited_greedy":
        group_BTG = jnp.max(by_group(scores_BTE, config), axis=-1)
        _, best_BTM = jax.lax.top_k(group_BTG, config.top_groups)
        kept_BTG = jnp.any(jax.nn.one_hot(best_BTM, config.num_groups, dtype=bool), axis=-2)
        kept_BTE = jnp.repeat(kept_BTG, config.num_experts // config.num_groups, axis=-1)
        # -inf rather than 0: a masked expert must lose to every other, whatever its affinity.
        selectable_BTE = jnp.where(kept_BTE, scores_BTE, -jnp.inf)
    if compare and scores_BTE.size * config.num_experts <= MOST_COMPARED:
        gates_BTK, indices_BTK = _best_by_comparison(scores_BTE, selectable_BTE, config.top_k)
    else:
        _, indices_BTK = jax.lax.top_k(selectable_BTE, config.top_k)
        gates_BTK = jnp.take_along_axis(scores_BTE, indices_BTK, axis=-1)
    if config.normalize_weights and config.top_k > 1:  # of one gate nothing but 1 would be left
        gates_BTK /= jnp.sum(gates_BTK, axis=-1, keepdims=True) + 1e-20
    else:
        gates_BTK *= config.routed_scale
    return gates_BTK, indices_BTK


def _best_by_comparison(
    scores_BTE: jax.Array, selectable_BTE: jax.Array, top_k: int
) -> tuple[jax.Array, jax.Array]:
    """Returns what top_k of `selectable_BTE` and a gather of `scores_BTE` would.

    Sums alone, which XLA computes in one kernel each with the softmax before them, where a sort
    takes four. An expert's rank is how many come before it: better ones, and earlier equal ones
    (letter X counts the others, K ranks).
    """
    expert_E = jnp.arange(scores_BTE.shape[-1], dtype=jnp.int32)
    other_BTEX, own_BTEX = selectable_BTE[..., None, :], selectable_BTE[..., :, None]
    earlier_EX = expert_E < expert_E[:, None]
    before_BTEX = (other_BTEX > own_BTEX) | ((other_BTEX == own_BTEX) & earlier_EX)
    rank_BTE = jnp.sum(before_BTEX, axis=-1, dtype=jnp.int32)
    is_rank_BTKE = rank_BTE[..., None, :] == jnp.arange(top_k, dtype=jnp.int32)[:, None]
    gates_BTK = jnp.sum(jnp.where(is_rank_BTKE, scores_BTE[..., None, :], 0), axis=-1)
    indices_BTK = jnp.sum(jnp.where(is_rank_BTKE, expert_E, 0), axis=-1, dtype=jnp.int32)
    # NaN comes before nothing, so that many may have one rank: what they add up to is no expert.
    return gates_BTK, jnp.minimum(indices_BTK, scores_BTE.shape[-1] - 1)
