"""What absorbed decode over a paged cache means: NumPy, float64."""

import numpy as np
from numpy.typing import ArrayLike

from pallas_kernels.mla_decode import LatentPages


def decode(
    q_latent_BTHC: ArrayLike,
    q_rope_BTHR: ArrayLike,
    pages: LatentPages,
    page_table_BP: ArrayLike,
    lengths_B: ArrayLike,
    *,
    scale: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (out, lse) in float64; a query that sees no key has out 0 and lse -inf."""
    f64 = np.float64
    q_latent, q_rope, latent, rope = (
        np.asarray(x).astype(f64) for x in (q_latent_BTHC, q_rope_BTHR, pages.latent, pages.rope)
    )
    if pages.scale is not None:
        latent = latent * np.asarray(pages.scale).astype(f64)[..., None]
    table, lengths = np.asarray(page_table_BP), np.asarray(lengths_B)
    B, T, H, C = q_latent.shape
    capacity = table.shape[1] * latent.shape[1]
    out, lse = np.zeros((B, T, H, C)), np.full((B, T, H), -np.inf)
    for b in range(B):
        # The last page of a sequence is cut where its keys end.
        keys = latent[table[b]].reshape(capacity, C)
        rotary = rope[table[b]].reshape(capacity, rope.shape[-1])
        for t in range(T):
            seen = min(int(lengths[b]) - T + t + 1, capacity)
            if seen <= 0:
                continue
            scores = scale * (q_latent[b, t] @ keys[:seen].T + q_rope[b, t] @ rotary[:seen].T)
            top = scores.max(axis=1, keepdims=True)
            weights = np.exp(scores - top)
            total = weights.sum(axis=1, keepdims=True)
            out[b, t] = (weights / total) @ keys[:seen]
            lse[b, t] = (top + np.log(total))[:, 0]
    return out, lse


def relative_error(actual: ArrayLike, desired: ArrayLike) -> float:
    """Returns ||actual - desired|| / ||desired||; infinities must stand in the same places."""
    actual, desired = np.asarray(actual).astype(np.float64), np.asarray(desired)
    finite = np.isfinite(desired)
    np.testing.assert_array_equal(actual[~finite], desired[~finite])
    difference = np.linalg.norm(actual[finite] - desired[finite])
    size = np.linalg.norm(desired[finite])
    return difference / size if size else difference
