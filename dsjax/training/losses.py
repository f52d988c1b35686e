"""The training objective: cross entropy from chunks of logits, z-loss, balance losses."""

from __future__ import annotations

import functools
from dataclasses import dataclass

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
    """What a step reports about its loss: float32 scalars, and the load.

    Attributes:
        total: what is minimised.
        cross_entropy: nats per target token.
        z: the z-loss after its weight.
        balance_expert: the expert-level balance loss after its weight, over all layers.
        balance_device: the device-level one.
        balance_communication: the communication one.
        load_LE: assignments of each expert in each sparse layer, [0, 0] of a dense model.
        dropped: share of assignments dropped, mean over the layers.
    """

    total: jax.Array
    cross_entropy: jax.Array
    z: jax.Array
    balance_expert: jax.Array
    balance_device: jax.Array
    balance_communication: jax.Array
    load_LE: jax.Array
    dropped: jax.Array


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
        nats, squared_z = sum_cross_entropy(
            model, hidden_BTD, batch["targets"], batch["weights"], config.chunk
        )
    # Each term is divided by the whole batch's weight, so that slices add up to it.
    cross_entropy = nats / total_weight
    z = config.z_loss * squared_z / total_weight
    expert, device, communication = (
        term * share for term in balance_terms(stats, config.balance, model.config.moe)
    )
    if stats is None:
        load_LE, dropped = jnp.zeros((0, 0)), jnp.zeros(())
    else:
        load_LE, dropped = stats.load_E, jnp.mean(stats.dropped) * share
    total = cross_entropy + z + expert + device + communication
    terms = LossTerms(total, cross_entropy, z, expert, device, communication, load_LE, dropped)
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


def sum_cross_entropy(
    model: DeepSeekV2,
    hidden_BTD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """Sums the weighted cross entropy, holding the logits of `chunk` tokens a device at a time.

    Args:
        model: for its output head.
        hidden_BTD: what `model.hidden` gave.
        targets_BT: int32 next tokens.
        weights_BT: float32; 0 where there is no target.
        chunk: tokens; the backward pass recomputes their logits. Rows are never cut, so it is at
            least one token of each.

    Returns:
        Weighted sums, float32 scalars: nats, and the squared log-partition (z-loss).
    """
    batch, length = targets_BT.shape
    rows = max(1, batch // model.options.rules.num_batch_shards())
    num_chunks = -(-length // max(1, chunk // rows))
    # The chunks' gradients of the output head are added up in its dtype.
    head = model.lm_head.stored().astype(jnp.float32)

    @jax.checkpoint
    def add_chunk(
        sums: tuple[jax.Array, jax.Array], xs: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        hidden_BtD, targets_Bt, weights_Bt = xs
        logits_BtW = model.lm_head.logits(hidden_BtD, head)
        log_partition_Bt = jax.nn.logsumexp(logits_BtW, axis=-1)
        target_Bt = jnp.take_along_axis(logits_BtW, targets_Bt[..., None], axis=-1)[..., 0]
        nats = jnp.sum((log_partition_Bt - target_Bt) * weights_Bt)
        squared_z = jnp.sum(jnp.square(log_partition_Bt) * weights_Bt)
        return (sums[0] + nats, sums[1] + squared_z), None

    split = functools.partial(_split_length, num_chunks=num_chunks)
    sums, _ = jax.lax.scan(
        add_chunk,
        (jnp.zeros(()), jnp.zeros(())),
        (split(hidden_BTD), split(targets_BT), split(weights_BT)),
    )
    return sums


def _split_length(x: jax.Array, num_chunks: int) -> jax.Array:
    """Moves equal chunks of the length dim to the front; the batch stays where it is sharded.

    Zeros, which weigh nothing in the loss, fill the length up to whole chunks.
    """
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % num_chunks)) + ((0, 0),) * (x.ndim - 2))
    batch, length = x.shape[:2]
    return jnp.moveaxis(x.reshape(batch, num_chunks, length // num_chunks, *x.shape[2:]), 1, 0)
