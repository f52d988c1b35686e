"""Attention computed by parts of its keys, which must come to what all of them give at once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.mla_attention.cases import Case
from pallas_kernels.mla_decode import merge_partial_attention
from tests import oracle_attention
from tests.oracle_attention import relative_error

# A device's queries, every second token of a row, and documents that begin and end anywhere.
CASE = Case("parts", batch=2, queries=150, keys=300, num_segments=3)


def check_parts(
    own: int,
    seed: int,
    dtype: Any,
    tolerance: float,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    case: Case = CASE,
) -> None:
    """Attends from every second token of a row to the even ones and the odd ones, one by one.

    Args:
        own: whether the queries are the odd tokens.
        seed: of the numbers.
        dtype: of the numbers.
        tolerance: of outputs and gradients, beside the oracle's over all keys.
        forward: of inputs and masks; returns out and log-sum-exp.
        backward: of inputs, masks, out, log-sum-exp and d_out; returns gradients.
        case: gives the sizes; twice as many keys as queries.
    """
    arrays, (_, k_ids, _), d_out = case.draw(seed, dtype)
    queries, keys = arrays[:2], arrays[2:]
    parts = []
    for source in range(2):
        offset = jnp.full(case.batch, 0 if source <= own else -1, jnp.int32)
        ids = (None, None) if k_ids is None else (k_ids[:, own::2], k_ids[:, source::2])
        parts.append(((*queries, *(x[:, source::2] for x in keys)), (*ids, offset)))
    outs, lses = zip(*(forward(*part) for part in parts), strict=True)
    out, lse = merge_partial_attention(
        jnp.stack(outs).astype(jnp.float32), jnp.stack([jnp.swapaxes(x, 1, 2) for x in lses])
    )
    out, lse = out.astype(dtype), jnp.swapaxes(lse, 1, 2)
    even, odd = (backward(*part, out, lse, d_out) for part in parts)

    def spread(x: jax.Array) -> jax.Array:
        """Makes the queries a whole row; the others' outputs have no gradient."""
        pair = [jnp.zeros_like(x)] * 2
        pair[own] = x
        return jnp.stack(pair, axis=2).reshape(x.shape[0], -1, *x.shape[2:])

    whole: tuple[Any, ...] = (*map(spread, queries), *keys, k_ids, k_ids, None, spread(d_out))
    want_out, want_lse, want = oracle_attention.attend(*whole, scale=case.scale, causal=True)
    assert relative_error(out, want_out[:, own::2]) < tolerance
    assert relative_error(lse, want_lse[:, :, own::2]) < tolerance
    for a, b, expected in zip(even[:2], odd[:2], want[:2], strict=True):
        got = a.astype(jnp.float32) + b.astype(jnp.float32)
        assert relative_error(got, expected[:, own::2]) < tolerance
    for a, b, expected in zip(even[2:], odd[2:], want[2:], strict=True):
        assert (
            relative_error(jnp.stack([a, b], axis=2).reshape(expected.shape), expected) < tolerance
        )
