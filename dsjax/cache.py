"""The latent cache: what generation remembers of a sequence, 576 numbers a token and layer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from dsjax.config import ModelConfig
from pallas_kernels.mla_decode import LatentPages, append_latents

# Lanes of a TPU's registers and of the rows in its memory.
TPU_LANES = 128


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LatentCache:
    """Paged latents of a batch of sequences, for all layers in one pool.

    Layer l keeps page p at `l * pages_per_layer + p` of the pool, so that no layer's part is ever
    sliced out of it.

    Attributes:
        pages: latent [num_layers * pages_per_layer, page_size, C] and rope [..., R], where R may
            be padded.
        page_table_BP: int32, pages of each sequence within a layer.
        lengths_B: int32, tokens of each sequence that are in the cache.
        num_layers: layers that share the pool.
    """

    pages: LatentPages
    page_table_BP: jax.Array
    lengths_B: jax.Array
    num_layers: int = dataclasses.field(metadata={"static": True})

    def layer_table(self, layer: jax.Array) -> jax.Array:
        """Returns a layer's page table, int32 [B, P], into the whole pool."""
        pages_per_layer = self.pages.latent.shape[0] // self.num_layers
        return self.page_table_BP + layer * pages_per_layer

    def write(
        self,
        layer: jax.Array,
        latent_BTC: jax.Array,
        k_rope_BTR: jax.Array,
        num_tokens_B: jax.Array | None = None,
    ) -> LatentCache:
        """Writes a layer's latents of new tokens behind each sequence; `advance` counts them.

        Args:
            layer: int32 scalar.
            latent_BTC: latents after their norm.
            k_rope_BTR: rotated shared keys.
            num_tokens_B: int32, how many of the T tokens are real; None for all.
        """
        if num_tokens_B is None:
            num_tokens_B = jnp.full_like(self.lengths_B, latent_BTC.shape[1])
        pages = append_latents(
            self.pages,
            latent_BTC,
            k_rope_BTR,
            self.layer_table(layer),
            self.lengths_B,
            num_tokens_B,
        )
        return dataclasses.replace(self, pages=pages)

    def advance(self, num_tokens_B: jax.Array | int) -> LatentCache:
        """Counts tokens that every layer has written."""
        return dataclasses.replace(self, lengths_B=self.lengths_B + num_tokens_B)


def allocate_cache(
    config: ModelConfig,
    batch_size: int,
    max_length: int,
    dtype: jnp.dtype,
    *,
    page_size: int = 64,
    decode_kernel: str = "xla",
) -> LatentCache:
    """Allocates an empty cache with room for every sequence at its longest.

    Args:
        config: sizes.
        batch_size: sequences.
        max_length: tokens a sequence may come to.
        dtype: of the latents.
        page_size: tokens a page holds.
        decode_kernel: implementation of `mla_decode` that will read it. For "tpu" the rotary keys
            are padded to whole lanes: they take no more of a TPU's memory so, and XLA does not
            copy the pool before each call.
    """
    rope_dim = config.attention.qk_rope_head_dim
    if decode_kernel == "tpu":
        rope_dim = -(-rope_dim // TPU_LANES) * TPU_LANES
    pages_per_sequence = -(-max_length // page_size)
    pages_per_layer = batch_size * pages_per_sequence
    shape = (config.num_layers * pages_per_layer, page_size)
    return LatentCache(
        pages=LatentPages(
            latent=jnp.zeros((*shape, config.attention.kv_lora_rank), dtype),
            rope=jnp.zeros((*shape, rope_dim), dtype),
            scale=None,
        ),
        page_table_BP=jnp.arange(pages_per_layer, dtype=jnp.int32).reshape(batch_size, -1),
        lengths_B=jnp.zeros(batch_size, jnp.int32),
        num_layers=config.num_layers,
    )


def latent_bytes_per_token(config: ModelConfig, bytes_per_number: int = 2) -> int:
    """Returns the bytes that the latent cache holds per token, over all layers."""
    attention = config.attention
    numbers = attention.kv_lora_rank + attention.qk_rope_head_dim
    return config.num_layers * numbers * bytes_per_number


def full_bytes_per_token(config: ModelConfig, bytes_per_number: int = 2) -> int:
    """Returns the bytes that a cache of per-head keys and values would hold per token."""
    attention = config.attention
    key = attention.qk_nope_head_dim + attention.qk_rope_head_dim
    numbers = attention.num_heads * (key + attention.v_head_dim)
    return config.num_layers * numbers * bytes_per_number
