"""A sum over as many passes as it takes, as a rule one.

How many tokens the experts of a device get is known only while the program runs, and its arrays
must have room for them. Room for the worst case would be mostly empty, and gathering empty rows
costs as much as gathering others; room for less would lose tokens. So a pass has room for somewhat
more than an even share, and there are as many passes as it takes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

First = Callable[[Any, Any], jax.Array]
Later = Callable[[jax.Array, Any, Any], jax.Array]


def sum_passes(
    first: First, later: Later, num_passes: jax.Array | None, fixed: Any, values: Any
) -> jax.Array:
    """Adds up what the passes give.

    Args:
        first: the first pass, of `fixed` and `values`; its intermediate results may be kept for the
            backward pass.
        later: the rare other ones, of their number from 1 on, int32, `fixed` and `values`; they are
            computed again in the backward pass.
        num_passes: int32; where passes exchange something, the same on all devices that do. None
            where one is enough whatever the values.
        fixed: a pytree of what has no gradient.
        values: a pytree of what has.

    Returns:
        The sum, in the dtype of what a pass gives.
    """
    if num_passes is None:
        return first(fixed, values)
    return _sum(first, later, num_passes, fixed, values)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum(first: First, later: Later, num_passes: jax.Array, fixed: Any, values: Any) -> jax.Array:
    out = first(fixed, values)
    return _add_later(out, lambda index: later(index, fixed, values), num_passes)


def _forward(
    first: First, later: Later, num_passes: jax.Array, fixed: Any, values: Any
) -> tuple[jax.Array, Any]:
    out, pull_first = jax.vjp(functools.partial(first, fixed), values)
    out = _add_later(out, lambda index: later(index, fixed, values), num_passes)
    return out, (pull_first, num_passes, fixed, values)


def _backward(first: First, later: Later, residuals: Any, d_out: jax.Array) -> tuple[Any, ...]:
    pull_first, num_passes, fixed, values = residuals

    def gradient(index: jax.Array) -> Any:
        return jax.vjp(functools.partial(later, index, fixed), values)[1](d_out)[0]

    return None, None, _add_later(pull_first(d_out)[0], gradient, num_passes)


_sum.defvjp(_forward, _backward)


def _add_later(total: Any, part: Callable[[jax.Array], Any], num_passes: jax.Array) -> Any:
    """Adds the parts of pass 1 and those after it."""

    def body(carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        index, total = carry
        return index + 1, jax.tree.map(jnp.add, total, part(index))

    return jax.lax.while_loop(lambda carry: carry[0] < num_passes, body, (jnp.int32(1), total))[1]
