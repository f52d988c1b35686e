"""A feed-forward layer of routed and shared experts, on one device or divided over the mesh."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dsjax.config import MoEConfig
from dsjax.kernels import Kernels
from dsjax.layers.linear import Linear, multiply
from dsjax.layers.mlp import MLP
from dsjax.layers.moe.balance import Dropping
from dsjax.layers.moe.dispatch import Dispatch, Routes, Sent, choose_dispatch
from dsjax.layers.moe.experts import ExpertWeights, apply_experts_to_rows
from dsjax.layers.moe.passes import sum_passes
from dsjax.layers.moe.router import Router, RouterStats, Routing
from dsjax.layers.options import LayerOptions
from dsjax.mesh import ShardingRules
from dsjax.quantise import dims_within

_INTO, _OUT = ("experts", "expert_embed", "mlp"), ("experts", "mlp", "expert_embed")


class MoE(nnx.Module):
    """`num_experts` routed experts, of which each token passes through a few, and shared ones."""

    def __init__(self, config: MoEConfig, hidden_dim: int, options: LayerOptions, rngs: nnx.Rngs):
        self.router = Router(config, hidden_dim, options, rngs)
        into = (config.num_experts, hidden_dim, config.intermediate_dim)
        out = (config.num_experts, config.intermediate_dim, hidden_dim)
        self.w_gate = Linear(into, _INTO, options, rngs, num_stacked=1)
        self.w_up = Linear(into, _INTO, options, rngs, num_stacked=1)
        self.w_down = Linear(out, _OUT, options, rngs, num_stacked=1)
        width = config.shared_intermediate_dim
        self.shared = MLP(hidden_dim, width, options, rngs) if width else None
        self.config = config
        self.options = options

    def __call__(
        self,
        x_BTD: jax.Array,
        mask_BT: jax.Array | None,
        dropping: Dropping | None,
        experts: ExpertWeights | None = None,
    ) -> tuple[jax.Array, RouterStats]:
        """Computes eq. 20 without its residual.

        Args:
            x_BTD: normalised residual stream, compute dtype.
            mask_BT: bool, False for padding; None for none.
            dropping: the token-dropping option; None to keep every token.
            experts: this layer's, where they lie in those of all layers; None for its own.

        Returns:
            out_BTD in the compute dtype, and the router's statistics.
        """
        with jax.named_scope("router"):
            routing, stats = self.router(x_BTD, mask_BT, dropping)
        shared = None if self.shared is None else _weights(self.shared)
        experts = _weights(self) if experts is None else experts
        with jax.named_scope("experts"):
            out_BTD = apply_experts(x_BTD, routing, experts, shared, self.config, self.options)
        return out_BTD, stats

    def stacked_weights(self, layer: jax.Array) -> ExpertWeights:
        """Returns one layer's experts within those of all: of a module that holds a stack."""
        return dataclasses.replace(_weights(self), layer=layer)


def apply_experts(
    x_BTD: jax.Array,
    routing: Routing,
    experts: ExpertWeights,
    shared: ExpertWeights | None,
    config: MoEConfig,
    options: LayerOptions,
) -> jax.Array:
    """Sums each token's experts, weighted by its gates, and the shared experts.

    Args:
        x_BTD: compute dtype.
        routing: experts and gates of each token.
        experts: of all devices; D is not divided where they lie among those of all layers.
        shared: the shared experts as one MLP, without E; None for none.
        config: how tokens are routed, which bounds the devices a token goes to.
        options: rules and kernels.

    Returns:
        out_BTD in x's dtype.

    Raises:
        ValueError: `kernels.exchange_chunks` does not divide a device's tokens.
    """
    rules, kernels = options.rules, options.kernels
    dispatch = choose_dispatch(
        config,
        kernels,
        num_shards=rules.axis_size("expert"),
        tokens_divided="expert" in rules.axes("batch"),
    )
    # Hidden widths are divided over the tensor axis, so each device has a part of every sum.
    of_device = functools.partial(
        _experts_of_device,
        dispatch=dispatch,
        kernels=kernels,
        gather_axes=rules.dividing_axes("expert_embed"),
        gather_shared_axes=rules.dividing_axes("param_embed"),
        sum_axes=() if rules.mesh is None else (*dispatch.sum_axes, *rules.axes("mlp")),
    )
    tokens: Any = ("batch", "length", "embed")
    chosen: Any = ("batch", "length", None)
    routed = Routing(chosen, chosen)
    run = rules.shard_map(
        of_device,
        in_dims=(tokens, routed, _dims(experts, rules), _shared_dims(shared, rules)),
        out_dims=tokens,
    )
    return run(x_BTD, routing, experts, shared)


def _experts_of_device(
    x_BTD: jax.Array,
    routing: Routing,
    experts: ExpertWeights,
    shared: ExpertWeights | None,
    *,
    dispatch: Dispatch,
    kernels: Kernels,
    gather_axes: tuple[str, ...],
    gather_shared_axes: tuple[str, ...],
    sum_axes: tuple[str, ...],
) -> jax.Array:
    """Runs on one device of the mesh, with its experts and its tokens."""
    experts = _gather(experts, gather_axes)
    shared = None if shared is None else _gather(shared, gather_shared_axes)
    x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
    gates_NK, indices_NK = (
        array_BTK.reshape(-1, array_BTK.shape[-1])
        for array_BTK in (routing.gates_BTK, routing.indices_BTK)
    )
    chunks = dispatch.num_chunks
    if x_ND.shape[0] % chunks:
        raise ValueError(
            f"kernels.exchange_chunks={chunks}: must divide a device's {x_ND.shape[0]} tokens"
        )
    run = functools.partial(
        _one_chunk,
        experts=experts,
        shared=shared,
        dispatch=dispatch,
        kernels=kernels,
    )
    if chunks == 1:
        out_ND = run(x_ND, gates_NK, indices_NK)
    else:  # they do not depend on one another
        pieces = (jnp.split(array, chunks) for array in (x_ND, gates_NK, indices_NK))
        out_ND = jnp.concatenate([run(*piece) for piece in zip(*pieces, strict=True)])
    if sum_axes:
        out_ND = jax.lax.psum(out_ND, sum_axes)
    return out_ND.reshape(x_BTD.shape)


def _one_chunk(
    x_ND: jax.Array,
    gates_NK: jax.Array,
    indices_NK: jax.Array,
    *,
    experts: ExpertWeights,
    shared: ExpertWeights | None,
    dispatch: Dispatch,
    kernels: Kernels,
) -> jax.Array:
    """Sums a chunk of tokens' experts, in as many passes as it takes."""
    routes = dispatch.plan(indices_NK)
    first = functools.partial(_first_pass, dispatch=dispatch, kernels=kernels)
    later = functools.partial(_later_pass, dispatch=dispatch, kernels=kernels)
    values = _Values(x_ND, gates_NK, experts, shared)
    return sum_passes(first, later, routes.num_passes, routes, values)


class _Values(NamedTuple):
    """What a pass computes with, and what has gradients."""

    x_ND: jax.Array
    gates_NK: jax.Array
    experts: ExpertWeights
    shared: ExpertWeights | None


def _first_pass(
    routes: Routes, values: _Values, *, dispatch: Dispatch, kernels: Kernels
) -> jax.Array:
    """Sends tokens to their experts and sums what comes back, the shared experts beside it.

    The shared experts wait for no exchange. Barriers hold their two halves where a compiler that
    runs exchanges beside products can hide one exchange by each: hidden rows before what was
    received is sorted, the products with `down` after the experts.
    """
    x_ND, gates_NK, experts, shared = values
    sent = dispatch.send(routes, 0, x_ND, gates_NK)
    hidden_NF = None
    if shared is not None and dispatch.waits:
        hidden_NF = _hidden(x_ND, shared, kernels)
        experts_RK, hidden_NF = jax.lax.optimization_barrier((sent.experts_RK, hidden_NF))
        sent = sent._replace(experts_RK=experts_RK)
    out_RD = _apply(sent, experts, routes, kernels)
    if shared is None:
        return dispatch.combine(out_RD, sent)
    if hidden_NF is None:
        hidden_NF = _hidden(x_ND, shared, kernels)
    else:
        out_RD, hidden_NF = jax.lax.optimization_barrier((out_RD, hidden_NF))
    shared_ND = dispatch.own(multiply(hidden_NF, shared.down, kernels))
    if experts.layer is not None and x_ND.shape[0] <= kernels.shared_beside:
        # Else the last product takes the routed experts' sum to add to, and so comes after them.
        shared_ND = jax.lax.optimization_barrier(shared_ND)
    return dispatch.combine(out_RD, sent) + shared_ND


def _later_pass(
    index: jax.Array, routes: Routes, values: _Values, *, dispatch: Dispatch, kernels: Kernels
) -> jax.Array:
    """Sends what the passes before had no room for."""
    sent = dispatch.send(routes, index, values.x_ND, values.gates_NK)
    return dispatch.combine(_apply(sent, values.experts, routes, kernels), sent)


def _apply(sent: Sent, experts: ExpertWeights, routes: Routes, kernels: Kernels) -> jax.Array:
    return apply_experts_to_rows(
        sent.x_RD,
        sent.experts_RK,
        sent.gates_RK,
        experts,
        sent.first_row,
        routes.num_rows,
        kernels,
    )


def _hidden(x_ND: jax.Array, shared: ExpertWeights, kernels: Kernels) -> jax.Array:
    """Hidden rows of the shared experts."""
    gate_NF, up_NF = (multiply(x_ND, matrix, kernels) for matrix in (shared.gate, shared.up))
    return jax.nn.silu(gate_NF) * up_NF


def _gather(weights: ExpertWeights, axes: tuple[str, ...]) -> ExpertWeights:
    """Gathers weights whose model width D is divided over mesh axes, just in time (fsdp)."""
    if not axes:
        return weights
    gate, up, down = weights.gate, weights.up, weights.down
    # The minor axis first: its parts lie beside one another.
    for axis in reversed(axes):
        gate, up = (
            jax.lax.all_gather(array, axis, axis=array.ndim - 2, tiled=True) for array in (gate, up)
        )
        down = jax.lax.all_gather(down, axis, axis=down.ndim - 1, tiled=True)
    return dataclasses.replace(weights, gate=gate, up=up, down=down)


def _dims(experts: ExpertWeights, rules: ShardingRules) -> Any:
    """The logical dims of a layer's experts, or of those of all layers."""
    layers, layer = ((), None) if experts.layer is None else (("layers",), ())
    matrices = (experts.gate, experts.up, experts.down)
    of_matrices = (
        dims_within(matrix, (*layers, *dims), rules)
        for matrix, dims in zip(matrices, (_INTO, _INTO, _OUT), strict=True)
    )
    return _weights_of(*of_matrices, layer)


def _weights_of(*leaves: Any) -> Any:
    """ExpertWeights with other leaves than arrays, as pytrees have them."""
    return ExpertWeights(*leaves)


def _shared_dims(shared: ExpertWeights | None, rules: ShardingRules) -> Any:
    """The logical dims of the shared experts."""
    if shared is None:
        return None
    into = ("param_embed", "mlp")
    matrices = (shared.gate, shared.up, shared.down)
    return _weights_of(
        *(
            dims_within(matrix, dims, rules)
            for matrix, dims in zip(matrices, (into, into, into[::-1]), strict=True)
        )
    )


def _weights(holder: MoE | MLP) -> ExpertWeights:
    """A layer's experts, or its shared ones as one wider MLP, in the compute type."""
    gate, up, down = (matrix.divided() for matrix in (holder.w_gate, holder.w_up, holder.w_down))
    return ExpertWeights(gate, up, down)
