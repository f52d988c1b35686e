"""What attention and its gradients mean: NumPy, float64."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike


def attend(
    q_nope_BTHN: ArrayLike,
    q_rope_BTHR: ArrayLike,
    k_nope_BSHN: ArrayLike,
    k_rope_BSR: ArrayLike,
    v_BSHV: ArrayLike,
    q_segment_ids_BT: ArrayLike | None = None,
    kv_segment_ids_BS: ArrayLike | None = None,
    q_offset_B: ArrayLike | None = None,
    d_out_BTHV: ArrayLike | None = None,
    *,
    scale: float,
    causal: bool,
    sizes: bool = False,
) -> tuple[Any, ...]:
    """Returns (out, lse) and, when `d_out_BTHV` is given, the gradients of the five float inputs.

    For each sequence and head, out = softmax(scale (q_nope k_nope' + q_rope k_rope')) v. A query
    that sees no key has out 0 and lse -inf.

    With `sizes` the gradients are those of a sum whose terms are all positive: what rounding is
    relative to, where a sharp softmax leaves next to nothing of terms that cancel.
    """
    f64 = np.float64
    absolute = np.abs if sizes else np.asarray
    q_nope, q_rope, k_nope, k_rope, v = (
        np.asarray(x).astype(f64)
        for x in (q_nope_BTHN, q_rope_BTHR, k_nope_BSHN, k_rope_BSR, v_BSHV)
    )
    B, T, H, _ = q_nope.shape
    S = k_nope.shape[1]
    out = np.zeros((B, T, H, v.shape[-1]))
    lse = np.full((B, H, T), -np.inf)
    grads = tuple(np.zeros_like(x) for x in (q_nope, q_rope, k_nope, k_rope, v))
    dq_nope, dq_rope, dk_nope, dk_rope, dv = grads
    for b in range(B):
        visible = np.ones((T, S), bool)
        if causal:
            offset = 0 if q_offset_B is None else int(np.asarray(q_offset_B)[b])
            visible &= np.arange(S)[None] <= np.arange(T)[:, None] + offset
        if q_segment_ids_BT is not None:
            visible &= (
                np.asarray(q_segment_ids_BT)[b][:, None] == np.asarray(kv_segment_ids_BS)[b][None]
            )
        seen = visible.any(axis=1)
        for h in range(H):
            scores = scale * (q_nope[b, :, h] @ k_nope[b, :, h].T + q_rope[b, :, h] @ k_rope[b].T)
            scores = np.where(visible, scores, -np.inf)
            top = np.where(seen, scores.max(axis=1), 0.0)
            weights = np.exp(scores - top[:, None])
            total = weights.sum(axis=1)
            lse[b, h, seen] = top[seen] + np.log(total[seen])
            weights /= np.where(seen, total, 1.0)[:, None]
            out[b, :, h] = weights @ v[b, :, h]
            if d_out_BTHV is None:
                continue
            d_out = np.asarray(d_out_BTHV).astype(f64)[b, :, h]
            d_weights = d_out @ v[b, :, h].T
            mean = (weights * d_weights).sum(axis=1, keepdims=True)
            d_scores = scale * weights * (d_weights - mean)
            if sizes:
                d_scores = scale * weights * (abs(d_weights) + abs(mean))
                d_out = abs(d_out)
            dq_nope[b, :, h] = d_scores @ absolute(k_nope[b, :, h])
            dq_rope[b, :, h] = d_scores @ absolute(k_rope[b])
            dk_nope[b, :, h] = d_scores.T @ absolute(q_nope[b, :, h])
            dk_rope[b] += d_scores.T @ absolute(q_rope[b, :, h])
            dv[b, :, h] = weights.T @ d_out
    if d_out_BTHV is None:
        return out, lse
    return out, lse, grads


def relative_error(actual: ArrayLike, expected: ArrayLike) -> float:
    """Returns |actual - expected| / |expected|, inf where infinities differ; NaN stays NaN."""
    actual, expected = (
        np.asarray(actual).astype(np.float64),
        np.asarray(expected).astype(np.float64),
    )
    infinite = np.isinf(expected)
    if (np.isinf(actual) != infinite).any() or (actual[infinite] != expected[infinite]).any():
        return np.inf
    actual, expected = np.where(infinite, 0, actual), np.where(infinite, 0, expected)
    norm = np.linalg.norm(expected)
    error = np.linalg.norm(actual - expected)
    return error / norm if norm > 0 else error
