"""The experts' computation, routed and shared, on one device or divided over the mesh."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from dsjax.config import MoEConfig
from dsjax.kernels import Kernels
from dsjax.layers.basic import LayerOptions
from dsjax.layers.expert_passes import Experts, PassSize, Weights, apply_local_experts
from dsjax.layers.router import Routing
from pallas_kernels.expert_exchange import (
    plan_exchange,
    return_tokens,
    send_choices,
    send_tokens,
)
from pallas_kernels.grouped_matmul import LayerOfStack

# Room of a pass comes in multiples of _ROUND; with at least _MIN_PASS, few tokens take one pass.
_ROUND, _MIN_PASS = 128, 256


def apply_experts(
    x_BTD: jax.Array,
    routing: Routing,
    experts: Experts,
    shared: Weights[jax.Array] | None,
    config: MoEConfig,
    options: LayerOptions,
) -> jax.Array:
    """Sums each token's experts, weighted by its gates, and the shared experts.

    Args:
        x_BTD: compute dtype.
        routing: experts and gates of each token.
        experts: gate and up [E, D, F], down [E, F, D], compute dtype; or each a LayerOfStack, in
            which D is not divided.
        shared: of the shared experts as one MLP, without E; None for none.
        config: how tokens are routed, which bounds the devices a token goes to.
        options: rules and kernels.

    Returns:
        out_BTD in x's dtype.

    Raises:
        ValueError: `kernels.exchange_chunks` does not divide a device's tokens.
    """
    rules = options.rules
    table = dict(rules.table)
    on_mesh = rules.mesh is not None
    of_device = functools.partial(
        _experts_of_device,
        config=config,
        kernels=options.kernels,
        gather_axes=rules.dividing_axes("expert_embed"),
        gather_shared_axes=rules.dividing_axes("param_embed"),
        sum_axes=table["mlp"] if on_mesh else (),
        num_shards=rules.axis_size("expert"),
        tokens_divided="expert" in table["batch"],
    )
    tokens, chosen = ("batch", "length", "embed"), ("batch", "length", None)
    into, out = ("experts", "expert_embed", "mlp"), ("experts", "mlp", "expert_embed")
    dims: list[tuple[str, ...]] = []
    for weight, each in zip(experts, (into, into, out), strict=True):
        dims += [("layers", *each), ()] if isinstance(weight, LayerOfStack) else [each]
    if shared is not None:
        dims += [("param_embed", "mlp"), ("param_embed", "mlp"), ("mlp", "param_embed")]
    weights, structure = jax.tree.flatten((experts, shared))
    of_device = functools.partial(of_device, structure=structure)
    run = rules.shard_map(of_device, (tokens, chosen, chosen, *dims), tokens)
    return run(x_BTD, routing.weights_BTK, routing.indices_BTK, *weights)


def max_shards(config: MoEConfig, num_shards: int) -> int:
    """Returns how many devices of the expert axis a token may go to.

    A group of experts (§2.2.2) lies on one device where the axis has at most as many devices as
    there are groups and divides them, so that this is the paper's M; else it spans several.
    """
    reachable = min(config.top_k, num_shards)
    if config.routing != "group_limited_greedy":
        return reachable
    return min(reachable, config.top_groups * _shards_of_a_group(config, num_shards))


def _shards_of_a_group(config: MoEConfig, num_shards: int) -> int:
    """Devices that a group of experts may span."""
    per_group = config.num_experts // config.num_groups
    per_shard = config.num_experts // num_shards
    return max(
        (first + per_group - 1) // per_shard - first // per_shard + 1
        for first in range(0, config.num_experts, per_group)
    )


def _experts_of_device(
    x_BTD: jax.Array,
    gates_BTK: jax.Array,
    indices_BTK: jax.Array,
    *weights: jax.Array,
    structure: Any,
    config: MoEConfig,
    kernels: Kernels,
    gather_axes: tuple[str, ...],
    gather_shared_axes: tuple[str, ...],
    sum_axes: tuple[str, ...],
    num_shards: int,
    tokens_divided: bool,
) -> jax.Array:
    """Runs on one device of the mesh, with its experts and its tokens."""
    experts, shared = jax.tree.unflatten(structure, weights)
    experts = _gather(experts, gather_axes)
    shared = None if shared is None else _gather(shared, gather_shared_axes)
    x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
    gates_NK = gates_BTK.reshape(-1, config.top_k)
    indices_NK = indices_BTK.reshape(-1, config.top_k)
    if num_shards > 1 and tokens_divided:
        chunks = kernels.exchange_chunks
        if x_ND.shape[0] % chunks:
            raise ValueError(
                f"kernels.exchange_chunks={chunks}: must divide a device's {x_ND.shape[0]} tokens"
            )
        # Pieces do not depend on one another, so one is computed while the next is exchanged.
        out_ND = jnp.concatenate(
            [
                _exchanged(x, gates, indices, experts, shared, config, kernels, num_shards)
                for x, gates, indices in zip(
                    *(jnp.split(array, chunks) for array in (x_ND, gates_NK, indices_NK)),
                    strict=True,
                )
            ]
        )
    else:
        out_ND = _of_all_tokens(x_ND, gates_NK, indices_NK, experts, config, kernels, num_shards)
        if shared is not None:
            shared_ND = _hidden(x_ND, shared) @ shared.down
            if num_shards > 1:  # every device has them whole, so one alone may add them
                shared_ND = jnp.where(jax.lax.axis_index("expert") == 0, shared_ND, 0)
            out_ND += shared_ND
        sum_axes = ("expert", *sum_axes) if num_shards > 1 else sum_axes
    if sum_axes:
        # Hidden widths are divided over the tensor axis, so each device has a part of every sum.
        out_ND = jax.lax.psum(out_ND, sum_axes)
    return out_ND.reshape(x_BTD.shape)


def _gather(weights: Weights, axes: tuple[str, ...]) -> Weights:
    """Gathers weights whose model width D is divided over mesh axes, just in time (fsdp)."""
    gate, up, down = weights
    # The minor axis first: its parts lie beside one another.
    for axis in reversed(axes):
        gate, up = (
            jax.lax.all_gather(array, axis, axis=array.ndim - 2, tiled=True) for array in (gate, up)
        )
        down = jax.lax.all_gather(down, axis, axis=down.ndim - 1, tiled=True)
    return Weights(gate, up, down)


def _hidden(x_ND: jax.Array, shared: Weights[jax.Array]) -> jax.Array:
    """Hidden rows of the shared experts, as `MLP` has them."""
    return jax.nn.silu(x_ND @ shared.gate) * (x_ND @ shared.up)


def _exchanged(
    x_ND: jax.Array,
    gates_NK: jax.Array,
    indices_NK: jax.Array,
    experts: Experts,
    shared: Weights[jax.Array] | None,
    config: MoEConfig,
    kernels: Kernels,
    num_shards: int,
) -> jax.Array:
    """Sends this device's tokens to the devices of their experts, and sums what comes back.

    The shared experts wait for none of it. Barriers hold their two halves where a compiler that
    runs exchanges beside products can hide one exchange behind each: hidden rows before what was
    received is sorted, the products with `down` after the experts.
    """
    plan = plan_exchange(
        indices_NK,
        num_experts=config.num_experts,
        max_shards=max_shards(config, num_shards),
        axis_name="expert",
        transport=kernels.expert_exchange,
    )
    rows_RD = send_tokens(x_ND, plan)
    experts_RK, gates_RK = send_choices(indices_NK, gates_NK, plan)
    if shared is not None:
        hidden_NF = _hidden(x_ND, shared)
        experts_RK, hidden_NF = jax.lax.optimization_barrier((experts_RK, hidden_NF))
    num_tokens, top_k = indices_NK.shape
    size = PassSize(
        tokens=_with_room(num_tokens * _mean_shards(config, num_shards), kernels),
        rows=_with_room(num_tokens * top_k, kernels),
    )
    rows_RD = apply_local_experts(
        rows_RD, experts_RK, gates_RK, plan.num_received, experts, size, kernels.grouped_matmul
    )
    if shared is None:
        return return_tokens(rows_RD, plan)
    rows_RD, hidden_NF = jax.lax.optimization_barrier((rows_RD, hidden_NF))
    # The last barrier keeps the product out of the sum of what returns, which must wait.
    shared_ND = jax.lax.optimization_barrier(hidden_NF @ shared.down)
    return return_tokens(rows_RD, plan) + shared_ND


def _of_all_tokens(
    x_ND: jax.Array,
    gates_NK: jax.Array,
    indices_NK: jax.Array,
    experts: Experts,
    config: MoEConfig,
    kernels: Kernels,
    num_shards: int,
) -> jax.Array:
    """Sums this device's experts for tokens that all devices have: what decoding does."""
    num_tokens, top_k = indices_NK.shape
    num_local = experts.gate.shape[0]
    rows = num_tokens * top_k
    if num_shards > 1:
        indices_NK = indices_NK - jax.lax.axis_index("expert") * num_local
        here_NK = (indices_NK >= 0) & (indices_NK < num_local)
        indices_NK = jnp.where(here_NK, indices_NK, num_local)
        gates_NK = jnp.where(here_NK, gates_NK, 0)
        rows = _with_room(rows / num_shards, kernels)
    size = PassSize(num_tokens, rows)
    return apply_local_experts(
        x_ND, indices_NK, gates_NK, num_tokens, experts, size, kernels.grouped_matmul
    )


def _with_room(even_share: float, kernels: Kernels) -> int:
    room = math.ceil(kernels.exchange_room * even_share / _ROUND) * _ROUND
    return max(room, _MIN_PASS)


def _mean_shards(config: MoEConfig, num_shards: int) -> float:
    """Devices a token goes to when its experts are spread evenly over those it may go to."""
    reach = num_shards
    if config.routing == "group_limited_greedy":
        reach = min(num_shards, config.top_groups * _shards_of_a_group(config, num_shards))
    return reach * (1 - (1 - 1 / reach) ** config.top_k)
