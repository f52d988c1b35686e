"""The routed experts' computation, on one device or with experts divided over the mesh."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from dsjax.layers.basic import LayerOptions
from dsjax.layers.router import Routing
from pallas_kernels.expert_exchange import combine_rows, gather_rows, sort_by_expert
from pallas_kernels.grouped_matmul import grouped_matmul, grouped_swiglu


def apply_experts(
    x_BTD: jax.Array,
    routing: Routing,
    w_gate: jax.Array,
    w_up: jax.Array,
    w_down: jax.Array,
    options: LayerOptions,
) -> jax.Array:
    """Sums each token's experts, weighted by its gates.

    Args:
        x_BTD: compute dtype.
        routing: experts and gates of each token.
        w_gate: [E, D, F], compute dtype.
        w_up: [E, D, F].
        w_down: [E, F, D].
        options: rules and kernels.

    Returns:
        out_BTD in x's dtype.
    """
    rules = options.rules
    grouped = options.kernels.grouped_matmul
    if rules.mesh is None:
        return _local_experts(
            x_BTD, routing.weights_BTK, routing.indices_BTK, w_gate, w_up, w_down, grouped
        )
    tokens, chosen = ("batch", "length", "embed"), ("batch", "length", None)
    into, out = ("experts", "expert_embed", "mlp"), ("experts", "mlp", "expert_embed")
    run = rules.shard_map(
        functools.partial(
            _sharded_experts,
            gather_axes=dict(rules.table)["expert_embed"],
            tokens_divided="expert" in dict(rules.table)["batch"],
            implementation=grouped,
        ),
        in_dims=(tokens, chosen, chosen, into, into, out),
        out_dims=tokens,
    )
    return run(x_BTD, routing.weights_BTK, routing.indices_BTK, w_gate, w_up, w_down)


def _local_experts(
    x_BTD: jax.Array,
    weights_BTK: jax.Array,
    indices_BTK: jax.Array,
    w_gate: jax.Array,
    w_up: jax.Array,
    w_down: jax.Array,
    implementation: str,
) -> jax.Array:
    """Sums the experts given here; an index outside 0 .. E - 1 belongs to none of them."""
    x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
    top_k = indices_BTK.shape[-1]
    order = sort_by_expert(indices_BTK.reshape(-1, top_k), w_gate.shape[0])
    rows_MD = gather_rows(x_ND, order)
    hidden_MF = grouped_swiglu(
        rows_MD, w_gate, w_up, order.group_sizes_E, implementation=implementation
    )
    rows_MD = grouped_matmul(hidden_MF, w_down, order.group_sizes_E, implementation=implementation)
    out_ND = combine_rows(rows_MD, weights_BTK.reshape(-1, top_k), order)
    return out_ND.reshape(x_BTD.shape)


def _sharded_experts(
    x_BTD: jax.Array,
    weights_BTK: jax.Array,
    indices_BTK: jax.Array,
    w_gate: jax.Array,
    w_up: jax.Array,
    w_down: jax.Array,
    *,
    gather_axes: tuple[str, ...],
    tokens_divided: bool,
    implementation: str,
) -> jax.Array:
    """Runs on one device of the mesh: its experts, for every token of its expert axis."""
    for axis in gather_axes:  # fsdp: weights are gathered just in time
        w_gate = jax.lax.all_gather(w_gate, axis, axis=1, tiled=True)
        w_up = jax.lax.all_gather(w_up, axis, axis=1, tiled=True)
        w_down = jax.lax.all_gather(w_down, axis, axis=2, tiled=True)
    if tokens_divided:
        x_BTD, weights_BTK, indices_BTK = (
            jax.lax.all_gather(array, "expert", axis=0, tiled=True)
            for array in (x_BTD, weights_BTK, indices_BTK)
        )
    num_local = w_gate.shape[0]
    first = jax.lax.axis_index("expert") * num_local
    local_BTK = indices_BTK - first
    elsewhere = (local_BTK < 0) | (local_BTK >= num_local)
    local_BTK = jnp.where(elsewhere, num_local, local_BTK)
    weights_BTK = jnp.where(elsewhere, 0, weights_BTK)
    out_BTD = _local_experts(x_BTD, weights_BTK, local_BTK, w_gate, w_up, w_down, implementation)
    # Hidden widths are divided over the tensor axis, so each device has a part of every sum.
    out_BTD = jax.lax.psum(out_BTD, "tensor")
    if tokens_divided:
        return jax.lax.psum_scatter(out_BTD, "expert", scatter_dimension=0, tiled=True)
    return jax.lax.psum(out_BTD, "expert")
