"""Absorbed latent attention of a few query tokens over the paged latent cache.

DeepSeek-V2 (arXiv 2405.04434), section 2.1.2: `wk_b` is absorbed into the query and `wv_b` into the
output, so a step of decoding attends in the latent space and reads 576 numbers per cached token,
whatever the number of heads; the same latent is key and value.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.mla_decode.merge import merge_partial_attention
from pallas_kernels.mla_decode.pages import (
    LatentPages,
    append_latents,
    check_query,
    pad_rope,
    quantize_latents,
)

__all__ = [
    "IMPLEMENTATIONS",
    "LatentPages",
    "append_latents",
    "merge_partial_attention",
    "mla_decode",
    "quantize_latents",
]

IMPLEMENTATIONS = ("reference", "xla", "tpu", "hopper")


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
            a sequence's length are ignored but must be in range.
        lengths_B: tokens of each sequence, the T query tokens included; 0 for a sequence that is
            not there. Where a sequence is spread over several pools, pass its length minus the
            position of this pool's first token: keys past the table's end, or before its start
            where that is negative, are not seen here.
        scale: factor of the scores, before the softmax.
        implementation: "reference" (the meaning), "xla" (portable), "tpu" (Mosaic TPU) or "hopper"
            (Mosaic GPU, sm_90).

    Returns:
        (out_BTHC, lse_BTH): the attended latents in the queries' dtype, and the float32 natural
        log-sum-exp of the scaled scores, with which `merge_partial_attention` joins shards of a
        sequence. A query that sees no key has out 0 and lse -inf.

    Raises:
        ValueError: an argument's shape or dtype does not fit, or the implementation does not take
            it, or there is no such implementation.
    """
    check_query(q_latent_BTHC, q_rope_BTHR, pages, page_table_BP, lengths_B)
    q_rope_BTHR = pad_rope(q_rope_BTHR, pages)
    page_table_BP = page_table_BP.astype(jnp.int32)
    lengths_B = lengths_B.astype(jnp.int32)
    # Imported when chosen: a machine without a GPU or a TPU need not load their compilers.
    match implementation:
        case "reference":
            from pallas_kernels.mla_decode.reference import decode as reference_decode

            decode = reference_decode
        case "xla":
            from pallas_kernels.mla_decode.xla import decode as xla_decode

            decode = xla_decode
        case "tpu":
            from pallas_kernels.mla_decode.tpu import decode as tpu_decode

            decode = tpu_decode
        case "hopper":
            from pallas_kernels.mla_decode.hopper import decode as hopper_decode

            decode = hopper_decode
        case _:
            raise ValueError(
                f"implementation is {implementation!r}; it must be one of {IMPLEMENTATIONS}"
            )
    return decode(q_latent_BTHC, q_rope_BTHR, pages, page_table_BP, lengths_B, scale=scale)
