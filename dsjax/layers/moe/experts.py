"""The experts of one device over whatever tokens reached it, in passes of a fixed size.

How many tokens the experts of a device get is known only while the program runs, and its arrays
must have room for them. Room for the worst case would be mostly empty, and gathering empty rows
costs as much as gathering others; room for less would lose tokens. So a pass has room for somewhat
more than an even share, and there are as many passes as it takes: as a rule one.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsjax.kernels import Kernels
from pallas_kernels.expert_permute import combine_rows, gather_rows, sort_by_expert
from pallas_kernels.grouped_matmul import LayerOfStack, grouped_matmul, grouped_swiglu


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ExpertWeights:
    """SwiGLU's three matrices for every expert of a layer, compute dtype.

    Attributes:
        gate: [E, D, F]; with `layer`, those of all layers, [L, E, D, F].
        up: likewise.
        down: [E, F, D], or [L, E, F, D].
        layer: int32 scalar, the layer, for kernels that read its experts where they lie among
            those of all layers; None where the matrices are the layer's own.
    """

    gate: jax.Array
    up: jax.Array
    down: jax.Array
    layer: jax.Array | None = None

    @property
    def num_experts(self) -> int:
        """E: all of a layer, or those of one device."""
        return self.gate.shape[-3]

    def matrices(self) -> tuple[GroupedWeights, GroupedWeights, GroupedWeights]:
        """Returns gate, up and down as the grouped matmul takes them."""
        if self.layer is None:
            return self.gate, self.up, self.down
        layer = self.layer  # one object, by which gate and up are known to be of one layer
        gate, up, down = (LayerOfStack(stack, layer) for stack in (self.gate, self.up, self.down))
        return gate, up, down


GroupedWeights = jax.Array | LayerOfStack


class PassSize(NamedTuple):
    """Room of a pass: tokens, and their rows, that is one for each of their experts here."""

    tokens: int
    rows: int


def apply_local_experts(
    x_ND: jax.Array,
    experts_NK: jax.Array,
    gates_NK: jax.Array,
    num_tokens: jax.Array | int,
    weights: ExpertWeights,
    size: PassSize,
    kernels: Kernels,
) -> jax.Array:
    """Sums each token's experts among those given, weighted by its gates in float32.

    Args:
        x_ND: compute dtype.
        experts_NK: int32; the number of experts given for one that is not among them.
        gates_NK: float32.
        num_tokens: tokens after this many have no experts.
        weights: the experts.
        size: room of a pass; nothing is lost where it is small, it only takes more passes.
        kernels: that copy rows and multiply them.

    Returns:
        out_ND in x's dtype; 0 for a token without experts here.

    Raises:
        ValueError: a pass without room for the experts of one token.
    """
    most = min(experts_NK.shape[1], weights.num_experts)  # a token's experts here
    whole = PassSize(x_ND.shape[0], x_ND.shape[0] * most)
    size = PassSize(min(size.tokens, whole.tokens), min(size.rows, whole.rows))
    if size == whole:
        return _one_pass(x_ND, experts_NK, gates_NK, weights, size.rows, kernels)
    if size.tokens < 1 or size.rows < most:
        raise ValueError(f"size: {size} must be at least 1 token and the {most} rows of one")
    return _passes(size, kernels, x_ND, experts_NK, gates_NK, num_tokens, weights)


def _one_pass(
    x_ND: jax.Array,
    experts_NK: jax.Array,
    gates_NK: jax.Array,
    weights: ExpertWeights,
    rows: int,
    kernels: Kernels,
) -> jax.Array:
    order = sort_by_expert(experts_NK, weights.num_experts, rows)
    gate, up, down = weights.matrices()
    permute, products = kernels.expert_permute, kernels.grouped_matmul
    rows_MD = gather_rows(x_ND, order, implementation=permute)
    hidden_MF = grouped_swiglu(rows_MD, gate, up, order.group_sizes_E, implementation=products)
    rows_MD = grouped_matmul(hidden_MF, down, order.group_sizes_E, implementation=products)
    return combine_rows(rows_MD, gates_NK, order, implementation=permute)


class _Window(NamedTuple):
    """What one pass takes: tokens first .. end - 1, cut out of the arrays from `start` on."""

    start: jax.Array
    first: jax.Array
    end: jax.Array


def _window(first: jax.Array, ends_N: jax.Array, size: PassSize) -> _Window:
    """Takes as many tokens from `first` on as there is room for; `ends_N` are running rows."""
    before = jnp.where(first > 0, ends_N[jnp.maximum(first - 1, 0)], 0)
    fitting = jnp.sum(ends_N <= before + size.rows, dtype=jnp.int32)
    # Cut from further to the front where the arrays end within the pass.
    start = jnp.minimum(first, ends_N.shape[0] - size.tokens)
    return _Window(start, first, jnp.minimum(first + size.tokens, fitting))


def _cut(array_N: jax.Array, window: _Window, tokens: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(array_N, window.start, tokens)


def _run_window(
    size: PassSize,
    kernels: Kernels,
    window: _Window,
    experts_NK: jax.Array,
    x_ND: jax.Array,
    gates_NK: jax.Array,
    weights: ExpertWeights,
) -> jax.Array:
    """Runs one pass; 0 for tokens that are not its own."""
    cut_NK = _cut(experts_NK, window, size.tokens)
    index_N1 = (window.start + jnp.arange(size.tokens))[:, None]
    own_N1 = (index_N1 >= window.first) & (index_N1 < window.end)
    cut_NK = jnp.where(own_N1, cut_NK, weights.num_experts)
    x_ND, gates_NK = _cut(x_ND, window, size.tokens), _cut(gates_NK, window, size.tokens)
    return _one_pass(x_ND, cut_NK, gates_NK, weights, size.rows, kernels)


def _running_rows(experts_NK: jax.Array, weights: ExpertWeights) -> jax.Array:
    return jnp.cumsum(jnp.sum(experts_NK < weights.num_experts, axis=1, dtype=jnp.int32))


def _add_cut(total_N: jax.Array, part_N: jax.Array, window: _Window) -> jax.Array:
    """Adds what a pass gave; it is 0 at tokens of other passes."""
    old_N = _cut(total_N, window, part_N.shape[0])
    return jax.lax.dynamic_update_slice_in_dim(total_N, old_N + part_N, window.start, 0)


def _pad(part_N: jax.Array, total: int) -> jax.Array:
    """Appends zeros, up to `total` tokens."""
    return jnp.pad(part_N, ((0, total - part_N.shape[0]), (0, 0)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _passes(
    size: PassSize,
    kernels: Kernels,
    x_ND: jax.Array,
    experts_NK: jax.Array,
    gates_NK: jax.Array,
    num_tokens: jax.Array,
    weights: ExpertWeights,
) -> jax.Array:
    arguments = (x_ND, experts_NK, gates_NK, num_tokens, weights)
    return _run_passes(size, kernels, *arguments, differentiate=False)[0]


def _run_passes(
    size: PassSize,
    kernels: Kernels,
    x_ND: jax.Array,
    experts_NK: jax.Array,
    gates_NK: jax.Array,
    num_tokens: jax.Array,
    weights: ExpertWeights,
    *,
    differentiate: bool = True,
) -> tuple[jax.Array, Any]:
    """Returns the sum, and the residuals if it is to be differentiated."""
    ends_N = _running_rows(experts_NK, weights)
    run = functools.partial(_run_window, size, kernels)
    # The first pass stands outside the loop, so that its intermediate results can be kept; the
    # rare later ones are computed again in the backward pass.
    first = _window(jnp.int32(0), ends_N, size)
    run_first, pull_first = functools.partial(run, first, experts_NK), None
    if differentiate:
        part_ND, pull_first = jax.vjp(run_first, x_ND, gates_NK, weights)
    else:  # not by jax.vjp: some weights have no gradient
        part_ND = run_first(x_ND, gates_NK, weights)

    def body(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        done, out_ND = carry
        window = _window(done, ends_N, size)
        part_ND = run(window, experts_NK, x_ND, gates_NK, weights)
        return window.end, _add_cut(out_ND, part_ND, window)

    carry = (first.end, _pad(part_ND, x_ND.shape[0]))
    _, out_ND = jax.lax.while_loop(lambda carry: carry[0] < num_tokens, body, carry)
    residuals = (pull_first, first.end, x_ND, experts_NK, gates_NK, num_tokens, weights, ends_N)
    return out_ND, residuals


def _passes_backward(
    size: PassSize, kernels: Kernels, residuals: Any, d_out_ND: jax.Array
) -> tuple[Any, ...]:
    pull_first, done, x_ND, experts_NK, gates_NK, num_tokens, weights, ends_N = residuals
    run = functools.partial(_run_window, size, kernels)

    def body(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        done, d_x_ND, d_gates_NK, d_weights = carry
        window = _window(done, ends_N, size)
        tokens = (_cut(x_ND, window, size.tokens), _cut(gates_NK, window, size.tokens))
        local = _Window(jnp.int32(0), window.first - window.start, window.end - window.start)
        local_NK = _cut(experts_NK, window, size.tokens)
        _, pull = jax.vjp(functools.partial(run, local, local_NK), *tokens, weights)
        d_x, d_gates, d_more = pull(_cut(d_out_ND, window, size.tokens))
        return (
            window.end,
            _add_cut(d_x_ND, d_x, window),
            _add_cut(d_gates_NK, d_gates, window),
            jax.tree.map(jnp.add, d_weights, d_more),
        )

    d_x_ND, d_gates_NK, d_weights = pull_first(d_out_ND[: size.tokens])
    carry = (done, d_x_ND, d_gates_NK, d_weights)
    _, d_x_ND, d_gates_NK, d_weights = jax.lax.while_loop(
        lambda carry: carry[0] < num_tokens, body, carry
    )
    return d_x_ND, None, d_gates_NK, None, d_weights


_passes.defvjp(_run_passes, _passes_backward)
