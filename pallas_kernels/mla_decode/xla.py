"""Absorbed decode in portable JAX: a loop over blocks of pages with a running softmax."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.manual_axes import vary_like
from pallas_kernels.mla_decode.pages import LatentPages
from pallas_kernels.precision import precision_of

# Keys gathered per step over the whole batch: enough for one step to fill a device, little enough
# that the gathered copy stays a small part of the cache (36 MiB at 576 numbers of bfloat16).
KEYS_PER_STEP = 32_768
MIN_KEYS_PER_SEQUENCE = 256
MAX_KEYS_PER_SEQUENCE = 2_048


def decode(
    q_latent_BTHC: Float[Array, "B T H C"],
    q_rope_BTHR: Float[Array, "B T H R"],
    pages: LatentPages,
    page_table_BP: Int[Array, "B P"],
    lengths_B: Int[Array, " B"],
    *,
    scale: float,
) -> tuple[Float[Array, "B T H C"], Float[Array, "B T H"]]:
    """Computes `mla_decode` block by block, never past the longest sequence.

    Products are taken in the queries' dtype and summed in float32, so a bfloat16 model does not
    widen its cache.
    """
    batch_size, num_tokens, num_heads, kv_rank = q_latent_BTHC.shape
    page_size, dtype = pages.page_size, q_latent_BTHC.dtype
    block_pages = _block_pages(batch_size, page_size, page_table_BP.shape[1])
    block_keys = block_pages * page_size
    num_keys_B = jnp.minimum(lengths_B, page_table_BP.shape[1] * page_size)
    # The last block may reach over the table's edge; what it reads there is masked.
    padding = -page_table_BP.shape[1] % block_pages
    page_table_BP = jnp.pad(page_table_BP, ((0, 0), (0, padding)))
    position_BT = lengths_B[:, None] - num_tokens + jnp.arange(num_tokens)
    position_BT = jnp.minimum(position_BT, num_keys_B[:, None] - 1)

    def step(block: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        acc_BTHC, max_BTH, sum_BTH = carry
        table = jax.lax.dynamic_slice_in_dim(page_table_BP, block * block_pages, block_pages, 1)

        def gather(pool: Array) -> Array:
            return pool[table].reshape(batch_size, block_keys, *pool.shape[2:])

        key_S = block * block_keys + jnp.arange(block_keys)
        # What lies beyond the length may be anything, NaN too, and 0 * NaN is NaN.
        cached_BS = key_S < num_keys_B[:, None]
        latent_BSC = jnp.where(cached_BS[..., None], gather(pages.latent), 0).astype(dtype)
        rope_BSR = gather(pages.rope).astype(dtype)
        scores_BTHS = _dot("BTHC,BSC->BTHS", q_latent_BTHC, latent_BSC)
        if pages.scale is not None:
            scale_BS = jnp.where(cached_BS, gather(pages.scale), 0.0)
            scores_BTHS = scores_BTHS * scale_BS[:, None, None]
        scores_BTHS = scale * (scores_BTHS + _dot("BTHR,BSR->BTHS", q_rope_BTHR, rope_BSR))
        visible_BTS = key_S <= position_BT[:, :, None]
        scores_BTHS = jnp.where(visible_BTS[:, :, None], scores_BTHS, -jnp.inf)

        new_max_BTH = jnp.maximum(max_BTH, scores_BTHS.max(axis=-1))
        shift_BTH = jnp.where(jnp.isneginf(new_max_BTH), 0.0, new_max_BTH)
        decay_BTH = jnp.exp(max_BTH - shift_BTH)
        probs_BTHS = jnp.exp(scores_BTHS - shift_BTH[..., None])
        sum_BTH = sum_BTH * decay_BTH + probs_BTHS.sum(axis=-1)
        if pages.scale is not None:
            probs_BTHS = probs_BTHS * scale_BS[:, None, None]
        update_BTHC = _dot("BTHS,BSC->BTHC", probs_BTHS.astype(dtype), latent_BSC)
        return acc_BTHC * decay_BTH[..., None] + update_BTHC, new_max_BTH, sum_BTH

    rows = (batch_size, num_tokens, num_heads)
    carry = (
        jnp.zeros((*rows, kv_rank), jnp.float32),
        jnp.full(rows, -jnp.inf, jnp.float32),
        jnp.zeros(rows, jnp.float32),
    )
    carry = vary_like(carry, (q_latent_BTHC, q_rope_BTHR, pages, page_table_BP, lengths_B))
    num_blocks = (num_keys_B.max(initial=0) + block_keys - 1) // block_keys
    acc_BTHC, max_BTH, sum_BTH = jax.lax.fori_loop(0, num_blocks, step, carry)

    seen_BTH = sum_BTH > 0
    total_BTH = jnp.where(seen_BTH, sum_BTH, 1.0)
    lse_BTH = jnp.where(seen_BTH, max_BTH + jnp.log(total_BTH), -jnp.inf)
    return (acc_BTHC / total_BTH[..., None]).astype(dtype), lse_BTH


def _block_pages(batch_size: int, page_size: int, table_pages: int) -> int:
    keys = max(MIN_KEYS_PER_SEQUENCE, min(MAX_KEYS_PER_SEQUENCE, KEYS_PER_STEP // batch_size))
    return max(1, min(keys // page_size, table_pages))


def _dot(spec: str, lhs: Array, rhs: Array) -> Array:
    """Contracts in the operands' dtype, float32 products exactly, and sums in float32."""
    precision = precision_of(lhs.dtype)
    return jnp.einsum(spec, lhs, rhs, precision=precision, preferred_element_type=jnp.float32)
