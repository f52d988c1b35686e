"""What absorbed decode means: gather the pages, mask, softmax, in plain jax.numpy and float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.mla_decode.pages import LatentPages


def decode(
    q_latent_BTHC: Float[Array, "B T H C"],
    q_rope_BTHR: Float[Array, "B T H R"],
    pages: LatentPages,
    page_table_BP: Int[Array, "B P"],
    lengths_B: Int[Array, " B"],
    *,
    scale: float,
) -> tuple[Float[Array, "B T H C"], Float[Array, "B T H"]]:
    """Computes `mla_decode` over the whole page table at once; memory grows with B * P."""
    batch_size, num_tokens = q_latent_BTHC.shape[:2]
    num_keys = page_table_BP.shape[1] * pages.page_size

    def gather(pool: Array) -> Array:
        rows = pool[page_table_BP].astype(jnp.float32)
        return rows.reshape(batch_size, num_keys, *pool.shape[2:])

    latent_BSC, rope_BSR = gather(pages.latent), gather(pages.rope)
    if pages.scale is not None:
        latent_BSC = latent_BSC * gather(pages.scale)[..., None]

    position_BT = lengths_B[:, None] - num_tokens + jnp.arange(num_tokens)
    visible_BTS = jnp.arange(num_keys) <= position_BT[:, :, None]
    # What lies beyond the length may be anything, NaN too, and 0 * NaN is NaN.
    cached_BS = jnp.arange(num_keys) < lengths_B[:, None]
    latent_BSC = jnp.where(cached_BS[..., None], latent_BSC, 0.0)

    highest = jax.lax.Precision.HIGHEST
    scores_BTHS = scale * (
        jnp.einsum(
            "BTHC,BSC->BTHS", q_latent_BTHC.astype(jnp.float32), latent_BSC, precision=highest
        )
        + jnp.einsum("BTHR,BSR->BTHS", q_rope_BTHR.astype(jnp.float32), rope_BSR, precision=highest)
    )
    scores_BTHS = jnp.where(visible_BTS[:, :, None], scores_BTHS, -jnp.inf)
    lse_BTH = jax.nn.logsumexp(scores_BTHS, axis=-1)
    shift_BTH = jnp.where(jnp.isneginf(lse_BTH), 0.0, lse_BTH)
    probs_BTHS = jnp.exp(scores_BTHS - shift_BTH[..., None])
    out_BTHC = jnp.einsum("BTHS,BSC->BTHC", probs_BTHS, latent_BSC, precision=highest)
    return out_BTHC.astype(q_latent_BTHC.dtype), lse_BTH
