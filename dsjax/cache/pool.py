"""The pool: pages of latents of all sequences and layers, on the device."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from dsjax.cache.shards import append_own, gather_tokens
from dsjax.cache.view import Part
from dsjax.config import ModelConfig
from dsjax.kernels import PAGE_SIZE, pool_rope_dim
from dsjax.mesh import ShardingRules
from dsjax.mesh.rules import Dims
from pallas_kernels.mla_decode import LatentPages
from pallas_kernels.quantised import row_scaled


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LatentPool:
    """Paged latents of all layers.

    Layer l keeps page p at `l * pages_per_layer + p`, so that no layer's part is ever sliced out.
    Where devices divide its pages, each has such a pool of its own, and numbers its pages from 0.
    Where they divide heads, each has a part of the tokens of every page: see `cache.shards`.

    Attributes:
        pages: latent [num_shards * num_layers * pages_per_layer, page_size, C] and rope [..., R],
            where R may be padded; scale [...] of latents in 8 bits.
        num_layers: layers that share the pool.
        num_shards: devices that divide its pages.
    """

    pages: LatentPages
    num_layers: int = dataclasses.field(metadata={"static": True})
    num_shards: int = dataclasses.field(default=1, metadata={"static": True})

    @property
    def page_size(self) -> int:
        """Tokens of a page, of all devices that divide them."""
        return self.pages.page_size

    @property
    def pages_per_layer(self) -> int:
        """Pages that each layer has, of one device."""
        return self.pages.latent.shape[0] // (self.num_layers * self.num_shards)

    def dims(self, rules: ShardingRules) -> LatentPages:
        """Returns the logical dims of the pages' arrays."""
        leading = pool_dims(rules)
        dims: LatentPages = jax.tree.map(
            lambda leaf: (*leading, *[None] * (leaf.ndim - len(leading))), self.pages
        )
        return dims

    def layer_table(self, layer: jax.Array, table_BP: jax.Array) -> jax.Array:
        """Returns pages of a layer as pages of a device's pool, int32."""
        return table_BP + layer * self.pages_per_layer

    def write(
        self,
        layer: jax.Array,
        part: Part,
        latent_BTC: jax.Array,
        k_rope_BTR: jax.Array,
        rules: ShardingRules,
    ) -> LatentPool:
        """Writes a layer's latents of a part's new tokens after what its sequences have.

        Args:
            layer: int32 scalar.
            part: where they go; its padding is not written.
            latent_BTC: latents after their norm.
            k_rope_BTR: rotated shared keys.
            rules: how devices divide sequences and pages.
        """
        tokens, numbers, dims = ("batch", None, None), ("batch",), self.dims(rules)
        write = rules.shard_map(
            functools.partial(append_own, rules.dividing_axes("page_tokens")),
            in_dims=(dims, tokens, tokens, ("batch", None), numbers, numbers),
            out_dims=dims,
        )
        pages = write(
            self.pages,
            latent_BTC,
            k_rope_BTR,
            self.layer_table(layer, part.page_table_BP),
            part.lengths_B,
            part.num_new_B,
        )
        return dataclasses.replace(self, pages=pages)

    def read(
        self, layer: jax.Array, table_BP: jax.Array, rope_dim: int, rules: ShardingRules
    ) -> tuple[jax.Array, jax.Array]:
        """Returns whole pages of a layer: latent_BSC and k_rope_BSR, S tokens of P pages.

        Where n devices divide the tokens of a page, each sends its own to all: (n - 1) / n (C + R)
        numbers for each of S tokens, whatever the number of heads.

        Args:
            layer: int32 scalar.
            table_BP: int32 pages.
            rope_dim: R, without what the pool is padded by.
            rules: how devices divide sequences and pages.
        """
        found = ("batch", None, None)
        read = rules.shard_map(
            functools.partial(_read, rope_dim=rope_dim, axes=rules.dividing_axes("page_tokens")),
            in_dims=(self.dims(rules), ("batch", None)),
            out_dims=(found, found),
        )
        latent_BSC, k_rope_BSR = read(self.pages, self.layer_table(layer, table_BP))
        return latent_BSC, k_rope_BSR

    def as_cached(self, latent_BTC: jax.Array) -> jax.Array:
        """Returns latents as they come back from the pool: rounded, where it has 8 bits for each.

        A text is then, but for near ties, the same wherever its prompt was cut into pieces.
        """
        if self.pages.scale is None:
            return latent_BTC
        stored_BTC, scale_BT = row_scaled(latent_BTC, self.pages.latent.dtype)
        return _widened(stored_BTC, scale_BT).astype(latent_BTC.dtype)


def pool_dims(rules: ShardingRules) -> Dims:
    """Returns the logical dims that devices divide of each of the pages' arrays."""
    return ("pages", "page_tokens") if rules.dividing_axes("page_tokens") else ("pages",)


def _read(
    pages: LatentPages, table_BP: jax.Array, *, rope_dim: int, axes: tuple[str, ...]
) -> tuple[jax.Array, jax.Array]:
    shape = (table_BP.shape[0], table_BP.shape[1] * pages.page_size)
    latent_BSC = pages.latent[table_BP].reshape(*shape, -1)
    k_rope_BSR = pages.rope[table_BP].reshape(*shape, -1)[..., :rope_dim]
    if pages.scale is not None:
        latent_BSC = _widened(latent_BSC, pages.scale[table_BP].reshape(*shape))
    latent_BSC = latent_BSC.astype(k_rope_BSR.dtype)
    return gather_tokens(axes, latent_BSC), gather_tokens(axes, k_rope_BSR)


def _widened(stored_BTC: jax.Array, scale_BT: jax.Array) -> jax.Array:
    return stored_BTC.astype(jnp.float32) * scale_BT[..., None]


def allocate_pool(
    config: ModelConfig,
    num_pages: int,
    dtype: DTypeLike,
    *,
    page_size: int = PAGE_SIZE,
    rope_dtype: DTypeLike | None = None,
    decode_kernel: str = "xla",
    num_shards: int = 1,
) -> LatentPool:
    """Allocates an empty pool.

    Args:
        config: sizes.
        num_pages: pages that each layer has, of one device.
        dtype: of the latents; int8 and float8_e4m3fn have a scale for each token.
        page_size: tokens a page holds, on all devices that divide them.
        rope_dtype: of the rotary keys; None for the latents', or bfloat16 where these have scales.
        decode_kernel: implementation of `mla_decode` that will read it.
        num_shards: devices that divide its pages.
    """
    pages = LatentPages.zeros(
        num_shards * config.num_layers * num_pages,
        page_size,
        config.attention.kv_lora_rank,
        pool_rope_dim(config.attention.qk_rope_head_dim, decode_kernel),
        dtype=dtype,
        rope_dtype=rope_dtype,
    )
    return LatentPool(pages, config.num_layers, num_shards)


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
