"""Absorbed latent attention of a few query tokens over the paged latent cache.

DeepSeek-V2 (arXiv 2405.04434), section 2.1.2: `wk_b` is absorbed into the query and `wv_b` into the
output, so a step of decoding attends in the latent space and reads 576 numbers per cached token,
whatever the number of heads. The same latent is key and value.

Four implementations have one meaning: "reference" (plain jax.numpy, small sizes), "xla" (portable),
"tpu" (Pallas, Mosaic TPU) and "hopper" (Pallas, Mosaic GPU, sm_90). Each is a module with `decode`.
Shape letters: B sequences, T query tokens of each, H heads, C numbers in a latent, R in a rotary
key, P pages of a sequence.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.implementations import IMPLEMENTATIONS, check_supported, load
from pallas_kernels.manual_axes import vary_like
from pallas_kernels.mla_decode.limits import supported
from pallas_kernels.mla_decode.merge import merge_partial_attention
from pallas_kernels.mla_decode.pages import LatentPages, append_latents, check_query, pad_rope

__all__ = [
    "IMPLEMENTATIONS",
    "LatentPages",
    "append_latents",
    "merge_partial_attention",
    "mla_decode",
    "supported",
]


def mla_decode(
    q_latent_BTHC: Float[Array, "B T H C"],
    q_rope_BTHR: Float[Array, "B T H R"],
    pages: LatentPages,
    page_table_BP: Int[Array, "B P"],
    lengths_B: Int[Array, " B"],
    *,
    scale: float,
    implementation: str,
) -> tuple[Float[Array, "B T H C"], Float[Array, "B T H"]]:
    """Attends from each sequence's last T tokens to its cached latents.

    Query t of sequence b sits at position lengths[b] - T + t and sees keys 0 to that position:
    score(s) = scale * (q_latent . latent[s] + q_rope . rope[s]), out = softmax(score) . latent.

    Args:
        q_latent_BTHC: queries times `wk_b`, so in latent space; float.
        q_rope_BTHR: the queries' rotary part, after rotation; same dtype. Where the pool's rotary
            keys are padded with zeros, the queries may be narrower.
        pages: the pool, with the T query tokens already appended.
        page_table_BP: the pages of each sequence, in order: indices into the pool. Entries beyond
            a sequence's length are ignored but must be in range. Without columns no key is seen.
        lengths_B: tokens of each sequence, the T query tokens included; 0 for a sequence that is
            not there. Where a sequence is spread over several pools, pass its length minus the
            position of this pool's first token. That may be negative or past the table's end: only
            keys of this pool are seen.
        scale: factor of the scores, before the softmax; positive and finite.
        implementation: one of IMPLEMENTATIONS.

    Returns:
        (out_BTHC, lse_BTH): the attended latents in the queries' dtype, and the float32 natural
        log-sum-exp of the scaled scores, with which `merge_partial_attention` joins shards of a
        sequence. A query that sees no key has out 0 and lse -inf.

    Raises:
        ValueError: shapes or dtypes that do not fit, an unknown implementation, or what it does not
            take (see `supported`).
    """
    check_query(q_latent_BTHC, q_rope_BTHR, pages, page_table_BP, lengths_B)
    if not 0 < scale < math.inf:
        raise ValueError(f"scale: {scale} must be positive and finite")
    _, num_tokens, num_heads, kv_rank = q_latent_BTHC.shape
    reason = supported(
        implementation,
        kv_rank=kv_rank,
        rope_dim=pages.rope.shape[-1],
        num_heads=num_heads,
        num_tokens=num_tokens,
        page_size=pages.page_size,
        table_pages=page_table_BP.shape[1],
        dtype=q_latent_BTHC.dtype,
        pages_dtype=pages.latent.dtype,
        rope_dtype=pages.rope.dtype,
    )
    check_supported(implementation, reason)
    if page_table_BP.shape[1] == 0:
        nothing = (
            jnp.zeros_like(q_latent_BTHC),
            jnp.full(q_latent_BTHC.shape[:3], -jnp.inf, jnp.float32),
        )
        return vary_like(nothing, (q_latent_BTHC, q_rope_BTHR, pages, page_table_BP, lengths_B))
    return load(__name__, implementation).decode(
        q_latent_BTHC,
        pad_rope(q_rope_BTHR, pages),
        pages,
        page_table_BP.astype(jnp.int32),
        lengths_B.astype(jnp.int32),
        scale=scale,
    )
