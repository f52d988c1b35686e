"""What the results of attention and of decode are held to, whatever implementation they are of."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests import oracle_attention, oracle_decode
from tests.oracle_attention import relative_error

GRADIENTS = ("dq_nope", "dq_rope", "dk_nope", "dk_rope", "dv")


def compare_attention(
    case: Any,
    arrays: Sequence[jax.Array],
    masks: Sequence[jax.Array | None],
    d_out: jax.Array,
    results: tuple[jax.Array, jax.Array, Sequence[jax.Array]],
    tolerance: float,
) -> None:
    """Asserts that (out, lse, grads) are the oracle's."""
    inputs: tuple[Any, ...] = (*arrays, *masks, d_out)
    out, lse, grads = results
    want_out, want_lse, want_grads = oracle_attention.attend(
        *inputs, scale=case.scale, causal=case.causal
    )
    dtype = arrays[0].dtype
    assert out.dtype == dtype
    assert relative_error(out, want_out) < tolerance
    compare_lse(lse, want_lse, tolerance)
    # A gradient that is 0 in theory is measured against the size of dv.
    floor = np.linalg.norm(want_grads[4]) * 1e-2
    floors = [floor] * 5
    if case.sharpness != 1:
        *_, sizes = oracle_attention.attend(
            *inputs, scale=case.scale, causal=case.causal, sizes=True
        )
        floors = [max(floor, np.linalg.norm(size)) for size in sizes[:4]] + [floor]
    for name, grad, want, floor in zip(GRADIENTS, grads, want_grads, floors, strict=True):
        assert grad.dtype == dtype
        error = np.linalg.norm(np.asarray(grad).astype(np.float64) - want)
        assert error <= tolerance * max(np.linalg.norm(want), floor), name


def compare_decode(
    case: Any, arguments: Sequence[Any], results: tuple[jax.Array, jax.Array], tolerance: float
) -> None:
    """Asserts that (out, lse) are the oracle's."""
    out, lse = results
    want_out, want_lse = oracle_decode.decode(*arguments, scale=case.scale)
    assert out.dtype == arguments[0].dtype
    assert relative_error(out, want_out) < tolerance
    compare_lse(lse, want_lse, tolerance)


def compare_lse(lse: jax.Array, want: np.ndarray, tolerance: float) -> None:
    """Asserts that a log-sum-exp is the oracle's."""
    assert lse.dtype == jnp.float32
    if want.size > 1:
        assert relative_error(lse, want) < min(tolerance, 1e-3)
    else:  # a single score, which may be near 0: only its absolute error means anything
        np.testing.assert_allclose(lse, want, rtol=0, atol=tolerance)
