"""One optimiser step as a jitted function of state and batch."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import SingleDeviceSharding
from jax.typing import DTypeLike

from dsjax.config import GuardConfig, LossConfig, OptimizerConfig
from dsjax.mesh import ShardingRules
from dsjax.model import DeepSeekV2, param_shardings
from dsjax.training.dropping import draw_exempt
from dsjax.training.losses import Batch, LossTerms, sum_cross_entropy, training_loss
from dsjax.training.optimizer import (
    Moments,
    apply_adamw,
    divide,
    global_norm,
    init_moments,
    join,
)
from dsjax.xla_options import compiler_options

# Why a step was not applied: the index is what the step reports.
SKIP_REASONS = (
    "",
    "the loss is not finite",
    "the gradient norm is not finite",
    "the loss spiked",
    "the gradient norm spiked",
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Guard:
    """Running means that spikes are judged by, float32, and counts, int32; all scalars."""

    mean_loss: jax.Array
    mean_norm: jax.Array
    applied: jax.Array
    skipped_in_a_row: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that a step changes.

    Attributes:
        step: int32, steps taken, skipped ones included.
        params: the model's parameters, in `param_dtype`.
        moments: what the optimiser remembers.
        guard: what the skipping of bad steps remembers.
    """

    step: jax.Array
    params: nnx.State
    moments: Moments
    guard: Guard


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepReport:
    """What a step says of itself; scalars replicated on all devices."""

    loss: LossTerms
    gradient_norm: jax.Array
    skip_reason: jax.Array
    skipped_in_a_row: jax.Array


def init_train_state(optimizer: OptimizerConfig, params: nnx.State) -> TrainState:
    """Returns the state before the first step."""

    def zero(dtype: DTypeLike) -> jax.Array:
        return jnp.zeros((), dtype)  # each its own array: a step donates them all

    return TrainState(
        step=zero(jnp.int32),
        params=params,
        moments=init_moments(optimizer, params),
        guard=Guard(zero(jnp.float32), zero(jnp.float32), zero(jnp.int32), zero(jnp.int32)),
    )


def state_shardings(state: TrainState, rules: ShardingRules) -> TrainState:
    """Returns a tree of NamedShardings for a state: moments lie where their parameters do."""
    params = param_shardings(state.params, rules)
    moments = state.moments
    each, _ = divide(params, moments)
    lost, ema = (None if tree is None else each for tree in (moments.lost, moments.ema))
    scalars = jax.tree.map(lambda _: rules.sharding(), (state.step, moments.count, state.guard))
    moments = Moments(scalars[1], each, each, lost, ema)
    return TrainState(scalars[0], params, moments, scalars[2])


def abstract_train_state(
    optimizer: OptimizerConfig, params: nnx.State, rules: ShardingRules, device: jax.Device
) -> TrainState:
    """Returns the shapes, dtypes and shardings of a run's state, allocating nothing.

    Args:
        optimizer: how gradients become updates.
        params: the parameters, real or abstract.
        rules: where they live.
        device: where everything lives off a mesh.
    """
    abstract = jax.eval_shape(functools.partial(init_train_state, optimizer), params)
    if rules.mesh is None:
        shardings = jax.tree.map(lambda _: SingleDeviceSharding(device), abstract)
    else:
        shardings = state_shardings(abstract, rules)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        shardings,
    )


def abstract_batch(rules: ShardingRules, shape: tuple[int, int, int]) -> dict[str, Any]:
    """Returns the shapes, dtypes and shardings of a step's batch.

    Args:
        rules: where its rows live.
        shape: slices, sequences of each, and tokens of these.
    """
    rows = rules.sharding(None, "batch", "length")
    batch = {
        name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)
        for name in ("tokens", "targets", "positions", "segment_ids")
    }
    return batch | {"weights": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=rows)}


@functools.cache
def jitted_train_step(platform: str) -> Any:
    """Returns `train_step` for a platform ("cpu", "gpu", "tpu"), jitted with its options."""
    return jax.jit(
        train_step,
        static_argnums=(0, 1, 2, 3),
        donate_argnums=4,
        compiler_options=compiler_options(platform) or None,
    )


def train_step(
    graphdef: nnx.GraphDef[DeepSeekV2],
    optimizer: OptimizerConfig,
    loss: LossConfig,
    guard: GuardConfig,
    state: TrainState,
    batch: Batch,
    learning_rate: jax.Array,
) -> tuple[TrainState, StepReport]:
    """Takes one step, or skips it where the loss or the gradient is bad.

    This is what a step does; what runs is `jitted_train_step` of a platform.

    Args:
        graphdef: the model's graph; carries its sharding rules and kernels.
        optimizer: how gradients become updates.
        loss: what is minimised.
        guard: which steps are bad.
        state: what the step changes; the jitted step consumes it.
        batch: tokens, targets, positions, segment_ids int32 [A, B, T] and weights float32
            [A, B, T]: A slices whose gradients are added up.
        learning_rate: float32 scalar.

    Returns:
        The next state, and what there is to report.
    """
    if loss.dropping is not None:
        exempt_AB = draw_exempt(loss.dropping, state.step, batch["tokens"].shape[:2])
        batch = batch | {"exempt": exempt_AB}
    trained, frozen = divide(state.params, state.moments)
    gradients, terms = accumulate_gradients(graphdef, loss, trained, batch, frozen)
    with jax.named_scope("optimizer"):
        norm = global_norm(gradients)
        remembered, skip_reason = _judge(guard, state.guard, terms.total, norm)
        trained, moments = apply_adamw(
            optimizer,
            trained,
            state.moments,
            gradients,
            norm,
            learning_rate,
            skip_reason == 0,
            state.step,
        )
    state = TrainState(state.step + 1, join(trained, frozen), moments, remembered)
    return state, StepReport(terms, norm, skip_reason, remembered.skipped_in_a_row)


def accumulate_gradients(
    graphdef: nnx.GraphDef[DeepSeekV2],
    config: LossConfig,
    params: nnx.State,
    batch: Batch,
    frozen: nnx.State | None = None,
) -> tuple[nnx.State, LossTerms]:
    """Returns the gradient of a whole batch [A, B, T], and its loss terms.

    One slice's gradients have their parameters' types. Several are added up in float32.

    Args:
        graphdef: the model's graph.
        config: what is minimised.
        params: what the gradient is of.
        batch: as `train_step` takes it.
        frozen: the model's other parameters, if it has others.
    """
    total_weight = jnp.maximum(jnp.sum(batch["weights"]), 1)
    num_slices = batch["tokens"].shape[0]

    def slice_gradient(one: Batch) -> tuple[nnx.State, LossTerms]:
        def loss(params: nnx.State) -> tuple[jax.Array, LossTerms]:
            model = nnx.merge(graphdef, join(params, frozen))
            return training_loss(model, one, config, total_weight, 1 / num_slices)

        return jax.grad(loss, has_aux=True)(params)

    if num_slices == 1:
        return slice_gradient(jax.tree.map(lambda x: x[0], batch))

    def wide_gradient(one: Batch) -> tuple[nnx.State, LossTerms]:
        gradients, terms = slice_gradient(one)
        return jax.tree.map(lambda g: g.astype(jnp.float32), gradients), terms

    first = jax.eval_shape(wide_gradient, jax.tree.map(lambda x: x[0], batch))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)

    def add(sums: Any, one: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, wide_gradient(one)), None

    return jax.lax.scan(add, zeros, batch)[0]


def _judge(
    config: GuardConfig, guard: Guard, loss: jax.Array, norm: jax.Array
) -> tuple[Guard, jax.Array]:
    """Decides whether a step is bad, and updates the running means if it is not."""
    warm = guard.applied >= config.warmup_steps
    bad = jnp.stack(
        [
            ~jnp.isfinite(loss),
            ~jnp.isfinite(norm),
            warm & (loss > config.loss_spike * guard.mean_loss),
            warm & (norm > config.norm_spike * guard.mean_norm),
        ]
    )
    skip_reason = jnp.where(jnp.any(bad), jnp.argmax(bad) + 1, 0)
    # Means over about the last 50 steps; the first steps count fully.
    rate = jnp.maximum(1 / (guard.applied.astype(jnp.float32) + 1), 0.02)
    applied = Guard(
        mean_loss=guard.mean_loss + rate * (loss - guard.mean_loss),
        mean_norm=guard.mean_norm + rate * (norm - guard.mean_norm),
        applied=guard.applied + 1,
        skipped_in_a_row=jnp.zeros_like(guard.skipped_in_a_row),
    )
    skipped = Guard(guard.mean_loss, guard.mean_norm, guard.applied, guard.skipped_in_a_row + 1)
    chosen = jax.tree.map(lambda a, s: jnp.where(skip_reason == 0, a, s), applied, skipped)
    return chosen, skip_reason


@functools.partial(jax.jit, static_argnums=(0, 1))
def eval_step(
    graphdef: nnx.GraphDef[DeepSeekV2], chunk: int, params: nnx.State, batch: Batch
) -> jax.Array:
    """Returns float32 [3]: nats, target tokens and document bytes, summed over a batch [B, T]."""
    model = nnx.merge(graphdef, params)
    hidden_BTD, _ = model.hidden(batch["tokens"], batch["positions"], batch["segment_ids"])
    sums = sum_cross_entropy(model, hidden_BTD, batch["targets"], batch["weights"], chunk)
    tokens, num_bytes = jnp.sum(batch["weights"]), jnp.sum(batch["num_bytes"])
    return jnp.stack([sums.nats, tokens, num_bytes.astype(jnp.float32)])
