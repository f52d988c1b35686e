"""The training objective: cross entropy from chunks of logits, z-loss, balance losses."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsjax.config import BalanceConfig, LossConfig, MoEConfig
from dsjax.config.train import BALANCE_NOT_CHOSEN
from dsjax.layers.moe import Dropping, RouterStats
from dsjax.model import DeepSeekV2

Batch = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LossTerms:
    """What a step reports about its loss: float32 scalars, and what its routers did.

    Attributes:
        total: what is minimised.
        cross_entropy: nats per target token.
        z: the z-loss after its weight.
        balance_expert: the expert-level balance loss after its weight, over all layers.
        balance_device: the device-level one.
        balance_communication: the communication one.
        load_LE: assignments of each expert in each sparse layer, [0, 0] of a dense model.
        dropped: share of assignments dropped, mean over the layers.
        entropy_L: of the router of each sparse layer, nats; None unless `loss.router_entropy`.
    """

    total: jax.Array
    cross_entropy: jax.Array
    z: jax.Array
    balance_expert: jax.Array
    balance_device: jax.Array
    balance_communication: jax.Array
    load_LE: jax.Array
    dropped: jax.Array
    entropy_L: jax.Array | None


def training_loss(
    model: DeepSeekV2, batch: Batch, config: LossConfig, total_weight: jax.Array, share: float
) -> tuple[jax.Array, LossTerms]:
    """Computes the loss of one slice of a batch, so that slices add up to the whole batch's.

    Args:
        model: the model.
        batch: tokens, targets, positions, segment_ids int32 [B, T] and weights float32 [B, T];
            with token dropping also exempt, bool [B], sequences of which nothing is dropped.
        config: weights of the terms.
        total_weight: float32, sum of the target weights over all slices.
        share: this slice's share of the batch's sequences.
    """
    dropping = None
    if config.dropping is not None:
        dropping = Dropping(batch["exempt"], config.dropping)
    hidden_BTD, stats = model.hidden(
        batch["tokens"], batch["positions"], batch["segment_ids"], dropping
    )
    with jax.named_scope("loss"):
        sums = sum_cross_entropy(
            model, hidden_BTD, batch["targets"], batch["weights"], config.chunk, config.z_loss
        )
    # Each term is divided by the whole batch's weight, so that slices add up to it.
    cross_entropy = sums.nats / total_weight
    z = config.z_loss * sums.squared_z / total_weight
    expert, device, communication = (
        term * share for term in balance_terms(stats, config.balance, model.config.moe)
    )
    if stats is None:
        load_LE, dropped = jnp.zeros((0, 0)), jnp.zeros(())
    else:
        load_LE, dropped = stats.load_E, jnp.mean(stats.dropped) * share
    entropy_L = None
    if stats is not None and config.router_entropy:
        entropy_L = stats.entropy * share
    total = sums.objective / total_weight + expert + device + communication
    balance = expert, device, communication
    terms = LossTerms(total, cross_entropy, z, *balance, load_LE, dropped, entropy_L)
    return total, terms


def balance_terms(
    stats: RouterStats | None, weights: BalanceConfig | None, moe: MoEConfig | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Weighs the routers' balance losses, each summed over the layers (§2.2.3).

    Raises:
        ValueError: a model with experts, and no weights.
    """
    if stats is None or moe is None:
        return jnp.zeros(()), jnp.zeros(()), jnp.zeros(())
    if weights is None:
        raise ValueError(f"loss.balance=None: {BALANCE_NOT_CHOSEN}")
    return (
        weights.expert * jnp.sum(stats.expert),
        weights.device * jnp.sum(stats.device),
        weights.communication * jnp.sum(stats.communication),
    )


class Sums(NamedTuple):
    """Weighted sums over tokens, float32 scalars; only `objective` has a gradient.

    Attributes:
        objective: nats, and the squared log-partition times its weight.
        nats: the cross entropy.
        squared_z: the squared log-partition.
    """

    objective: jax.Array
    nats: jax.Array
    squared_z: jax.Array


def sum_cross_entropy(
    model: DeepSeekV2,
    hidden_BTD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    chunk: int,
    z_weight: float = 0.0,
) -> Sums:
    """Sums the weighted cross entropy, holding the logits of `chunk` tokens a device at a time.

    Where a gradient is asked for, each chunk's is computed while its logits are there: nothing is
    multiplied again, and what the backward pass does is to scale it.

    Args:
        model: for its output head.
        hidden_BTD: what `model.hidden` gave.
        targets_BT: int32 next tokens.
        weights_BT: float32; 0 where there is no target. They have no gradient.
        chunk: tokens. Rows are never cut, so it is at least one token of each.
        z_weight: of the squared log-partition in the objective.
    """
    batch, length = targets_BT.shape
    lm_head, rules = model.lm_head, model.options.rules
    shards, stripes = rules.num_batch_shards(), rules.num_shards("length")
    divided = shards * stripes > 1 and batch % shards == 0
    if divided:
        length //= stripes
    num_chunks = -(-length // max(1, chunk // max(1, batch // shards)))
    split = functools.partial(_split_length, num_chunks=num_chunks)
    start = Sums(jnp.zeros(()), jnp.zeros(()), jnp.zeros(()))

    def add_sums(sums: Sums, logits_BtW: jax.Array, xs: Any) -> tuple[Sums, jax.Array]:
        """Adds a chunk's; returns its log-partition too."""
        _, targets_Bt, weights_Bt = xs
        log_z_Bt = jax.nn.logsumexp(logits_BtW, axis=-1)
        target_Bt = jnp.take_along_axis(logits_BtW, targets_Bt[..., None], axis=-1)[..., 0]
        nats = jnp.sum((log_z_Bt - target_Bt) * weights_Bt)
        squared_z = jnp.sum(jnp.square(log_z_Bt) * weights_Bt)
        added = Sums(nats + z_weight * squared_z, nats, squared_z)
        return jax.tree.map(jnp.add, sums, added), log_z_Bt

    @jax.custom_vjp
    def run(hidden_BTD: jax.Array, head_DW: jax.Array, xs: Any) -> Sums:
        narrow_DW = head_DW.astype(hidden_BTD.dtype)

        def body(sums: Sums, xs: Any) -> tuple[Sums, None]:
            return add_sums(sums, lm_head.logits(xs[0], narrow_DW), xs)[0], None

        return jax.lax.scan(body, start, (split(hidden_BTD), *xs))[0]

    def forward(hidden_BTD: jax.Array, head_DW: jax.Array, xs: Any) -> tuple[Sums, Any]:
        narrow_DW = head_DW.astype(hidden_BTD.dtype)

        def body(carry: tuple[Sums, jax.Array], xs: Any) -> tuple[Any, jax.Array]:
            hidden_BtD, targets_Bt, weights_Bt = xs
            logits_BtW = lm_head.logits(hidden_BtD, narrow_DW)
            sums, log_z_Bt = add_sums(carry[0], logits_BtW, xs)
            is_target = jnp.arange(logits_BtW.shape[-1]) == targets_Bt[..., None]
            slope_Bt = weights_Bt * (1 + 2 * z_weight * log_z_Bt)
            softmax_BtW = jnp.exp(logits_BtW - log_z_Bt[..., None])
            d_logits_BtW = slope_Bt[..., None] * softmax_BtW
            d_logits_BtW -= jnp.where(is_target, weights_Bt[..., None], 0)
            d_logits_BtW = d_logits_BtW.astype(hidden_BtD.dtype)
            d_hidden_BtD = jnp.einsum("BtW,DW->BtD", d_logits_BtW, narrow_DW)
            # The chunks' gradients of the head are added up in float32.
            d_head_DW = carry[1] + jnp.einsum(
                "BtD,BtW->DW", hidden_BtD, d_logits_BtW, preferred_element_type=jnp.float32
            )
            return (sums, d_head_DW), d_hidden_BtD

        zeros = jnp.zeros(head_DW.shape, jnp.float32)
        carry, d_hidden = jax.lax.scan(body, (start, zeros), (split(hidden_BTD), *xs))
        dtypes = jnp.zeros((), hidden_BTD.dtype), jnp.zeros((), head_DW.dtype)
        return carry[0], (d_hidden, carry[1], dtypes)

    def backward(kept: Any, d_sums: Sums) -> tuple[jax.Array, jax.Array, None]:
        d_hidden, d_head_DW, dtypes = kept
        rows, width = d_hidden.shape[1], d_hidden.shape[-1]
        d_hidden_BTD = jnp.moveaxis(d_hidden, 0, 1).reshape(rows, -1, width)
        d_hidden_BTD = d_hidden_BTD[:, :length].astype(jnp.float32)
        scaled = (d_sums.objective * d_hidden_BTD, d_sums.objective * d_head_DW)
        d_hidden_BTD, d_head_DW = (x.astype(d.dtype) for x, d in zip(scaled, dtypes, strict=True))
        return d_hidden_BTD, d_head_DW, None

    run.defvjp(forward, backward)

    def add_chunks(head_DW: jax.Array, hidden_BTD: jax.Array, *labels: jax.Array) -> Sums:
        return run(hidden_BTD, head_DW, tuple(split(array) for array in labels))

    arrays = (hidden_BTD, targets_BT, weights_BT)
    if not divided:
        return add_chunks(lm_head.stored(), *arrays)

    # Each device adds up its own tokens. So the head is gathered once, not in every chunk, and its
    # gradient, a partial sum on each device, is scattered once.
    axes = rules.dividing_axes("param_embed")

    def add_rows(head_DW: jax.Array, *arrays: jax.Array) -> Sums:
        head_DW = _gather(axes, arrays[0].dtype, head_DW) if axes else head_DW
        return jax.tree.map(lambda x: x[(None,) * len(parts)], add_chunks(head_DW, *arrays))

    rows = ("batch", "length")
    head_dims = ("param_embed", "vocab")
    parts = rows if stripes > 1 else ("batch",)
    sums_dims = jax.tree.map(lambda _: parts, start)
    add = rules.shard_map(
        add_rows,
        (head_dims, (*rows, "embed"), rows, rows),
        sums_dims,
        axes=(*rules.axes("batch"), *rules.dividing_axes("length")),
    )
    return jax.tree.map(jnp.sum, add(lm_head.stored().astype(jnp.float32), *arrays))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather(axes: tuple[str, ...], dtype: jnp.dtype, weight: jax.Array) -> jax.Array:
    """Gathers dim 0 of a float32 matrix in a narrower type, inside a `shard_map`.

    One mesh axis after another (see `ShardingRules.gather_minor_axes`), the minor one first. The
    gradient, float32, is summed and scattered the other way around.
    """
    weight = weight.astype(dtype)
    for axis in reversed(axes):
        weight = jax.lax.all_gather(weight, axis, axis=0, tiled=True)
    return weight.astype(jnp.float32)


def _scatter(axes: tuple[str, ...], _dtype: jnp.dtype, _: None, d: jax.Array) -> tuple[jax.Array]:
    for axis in axes:
        d = jax.lax.psum_scatter(d, axis, scatter_dimension=0, tiled=True)
    return (d,)


_gather.defvjp(lambda axes, dtype, weight: (_gather(axes, dtype, weight), None), _scatter)


def _split_length(x: jax.Array, num_chunks: int) -> jax.Array:
    """Moves equal chunks of the length dim to the front; the batch stays where it is sharded.

    Zeros, which weigh nothing in the loss, fill the length up to whole chunks.
    """
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % num_chunks)) + ((0, 0),) * (x.ndim - 2))
    batch, length = x.shape[:2]
    return jnp.moveaxis(x.reshape(batch, num_chunks, length // num_chunks, *x.shape[2:]), 1, 0)
