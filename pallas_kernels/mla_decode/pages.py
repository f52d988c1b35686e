"""The paged latent cache as arrays: one pool of pages, and the append that writes into it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.chips import TPU_LANES
from pallas_kernels.quantised import is_quantised, row_scaled


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LatentPages:
    """A pool of pages of latents and rotary keys, of one layer or of many.

    A page holds `page_size` consecutive tokens of one sequence. A pool of several layers stores
    layer l's page p as page l * P + p; the caller adds l * P to its page table. The fields are
    plain arrays, so a pool can be donated, carried in a scan, sharded and saved like any other.

    Attributes:
        latent: [num_pages, page_size, C], the normalised latents, float or int8 / float8_e4m3fn.
        rope: [num_pages, page_size, R], the shared rotary keys after rotation, never quantised. The
            pool may be as wide as whole lanes of 128, with zeros after the keys: a TPU's memory
            holds these in any case, and XLA would copy a narrower pool before each decode.
        scale: [num_pages, page_size] float32, a token's factor of its quantised latent: any finite
            number, 0 and negative ones too; None for latents that are not quantised. In a slot that
            holds no token it may be anything, NaN too, as the latent and the rotary key may.
    """

    # Any: a pytree's leaves may also be shapes, shardings or None while jax transforms it.
    latent: Any
    rope: Any
    scale: Any = None

    @classmethod
    def zeros(
        cls,
        num_pages: int,
        page_size: int,
        kv_rank: int,
        rope_dim: int,
        *,
        dtype: Any,
        rope_dtype: Any = None,
    ) -> "LatentPages":
        """Makes an empty pool.

        Args:
            num_pages: pages in the pool, over all layers.
            page_size: tokens in a page.
            kv_rank: numbers in a latent.
            rope_dim: numbers in a rotary key.
            dtype: the latents' dtype; int8 and float8_e4m3fn make a quantised pool.
            rope_dtype: the rotary keys' dtype; by default the latents', bfloat16 when quantised.

        Returns:
            The pool, all zeros.
        """
        quantised = is_quantised(dtype)
        if rope_dtype is None:
            rope_dtype = jnp.bfloat16 if quantised else dtype
        return cls(
            latent=jnp.zeros((num_pages, page_size, kv_rank), dtype),
            rope=jnp.zeros((num_pages, page_size, rope_dim), rope_dtype),
            scale=jnp.ones((num_pages, page_size), jnp.float32) if quantised else None,
        )

    @property
    def num_pages(self) -> int:
        """Pages in the pool."""
        return self.latent.shape[0]

    @property
    def page_size(self) -> int:
        """Tokens in a page."""
        return self.latent.shape[1]

    @property
    def quantised(self) -> bool:
        """Whether the latents are integers or 8-bit floats with a scale per token."""
        return self.scale is not None


def append_latents(
    pages: LatentPages,
    latent_BTC: Float[Array, "B T C"],
    rope_BTR: Float[Array, "B T R"],
    page_table_BP: Int[Array, "B P"],
    start_B: Int[Array, " B"],
    num_tokens_B: Int[Array, " B"],
) -> LatentPages:
    """Writes new tokens into their sequences' pages.

    Token t < num_tokens[b] of sequence b goes to position start[b] + t; the others write nothing,
    nor do those whose position is negative or past the end of the page table, or whose page is
    none of the pool's, such as -1: where a sequence is spread over several pools, each takes its
    own tokens, with `start_B` counted from the position of its first one.
    The pool is updated in place when it is donated to the jitted caller or carried in a loop. A
    quantised pool gets the latents rounded by `row_scaled`.

    Args:
        pages: the pool.
        latent_BTC: the new tokens' normalised latents.
        rope_BTR: their rotary keys, after rotation; zeros are written after them where the pool is
            wider.
        page_table_BP: the pages of each sequence, in order; indices into the pool. Two sequences
            that write must not share the page they write to.
        start_B: the position of each sequence's first new token.
        num_tokens_B: how many of the T tokens each sequence appends, 0 to T.

    Returns:
        The pool with the tokens written.

    Raises:
        ValueError: a shape or dtype does not fit the pool.
    """
    check_pages(pages)
    batch_size, num_tokens, _ = latent_BTC.shape
    _check_shape("latent_BTC", latent_BTC, (batch_size, num_tokens, pages.latent.shape[-1]))
    _check_rope("rope_BTR", rope_BTR, (batch_size, num_tokens), pages)
    _check_indices(page_table_BP, batch_size)
    _check_lengths("start_B", start_B, batch_size)
    _check_lengths("num_tokens_B", num_tokens_B, batch_size)

    columns = page_table_BP.shape[1]
    if columns == 0:
        return pages
    page_table_BP = page_table_BP.astype(jnp.int32)
    position_BT = start_B.astype(jnp.int32)[:, None] + jnp.arange(num_tokens)
    page_BT = jnp.take_along_axis(
        page_table_BP, position_BT // pages.page_size, axis=1, mode="clip"
    )
    # A page past the pool is dropped by the scatter: that is how a token is not written.
    written_BT = jnp.arange(num_tokens) < num_tokens_B[:, None]
    written_BT &= (position_BT >= 0) & (position_BT < columns * pages.page_size)
    written_BT &= page_BT >= 0  # The scatter would count a negative one from the pool's end.
    page_BT = jnp.where(written_BT, page_BT, pages.num_pages)
    slot_BT = position_BT % pages.page_size

    def write(pool: Array, values: Array) -> Array:
        return pool.at[page_BT, slot_BT].set(values.astype(pool.dtype), mode="drop")

    scale = pages.scale
    if scale is not None:
        latent_BTC, scale_BT = row_scaled(latent_BTC, pages.latent.dtype)
        scale = write(scale, scale_BT)
    return LatentPages(
        latent=write(pages.latent, latent_BTC),
        rope=write(pages.rope, pad_rope(rope_BTR, pages)),
        scale=scale,
    )


def pad_rope(rope: Float[Array, "*tokens R"], pages: LatentPages) -> Float[Array, "*tokens lanes"]:
    """Appends zeros to rotary keys or queries up to the width of the pool's."""
    missing = pages.rope.shape[-1] - rope.shape[-1]
    return jnp.pad(rope, [(0, 0)] * (rope.ndim - 1) + [(0, missing)]) if missing else rope


def check_pages(pages: LatentPages) -> None:
    """Raises a ValueError that names the field of `pages` which does not fit the others."""
    latent, rope, scale = pages.latent, pages.rope, pages.scale
    if latent.ndim != 3:
        raise ValueError(f"pages.latent: shape {latent.shape} must be [page, token, rank]")
    if 0 in latent.shape:
        raise ValueError(f"pages.latent: shape {latent.shape} must not be empty")
    quantised = is_quantised(latent.dtype)
    if not quantised and not jnp.issubdtype(latent.dtype, jnp.floating):
        raise ValueError(
            f"pages.latent: dtype {latent.dtype} must be a float, int8 or float8_e4m3fn"
        )
    if rope.ndim != 3 or rope.shape[:2] != latent.shape[:2]:
        raise ValueError(
            f"pages.rope: shape {rope.shape} must be [{latent.shape[0]}, {latent.shape[1]}, rope], "
            "as pages.latent is"
        )
    if not jnp.issubdtype(rope.dtype, jnp.floating) or rope.dtype.itemsize < 2:
        raise ValueError(f"pages.rope: dtype {rope.dtype} must be a float of 16 bits or more")
    if quantised and (scale is None or scale.shape != latent.shape[:2]):
        raise ValueError(
            f"pages.scale: {scale if scale is None else scale.shape} must be one scale per token, "
            f"{latent.shape[:2]}, for latents of dtype {latent.dtype}"
        )
    if quantised and scale.dtype != jnp.float32:
        raise ValueError(f"pages.scale: dtype {scale.dtype} must be float32")
    if not quantised and scale is not None:
        raise ValueError(
            f"pages.scale: must be None for latents that are not quantised, of dtype {latent.dtype}"
        )


def check_query(
    q_latent_BTHC: Array,
    q_rope_BTHR: Array,
    pages: LatentPages,
    page_table_BP: Array,
    lengths_B: Array,
) -> None:
    """Raises a ValueError that names the argument of `mla_decode` which does not fit."""
    check_pages(pages)
    if q_latent_BTHC.ndim != 4:
        raise ValueError(
            f"q_latent_BTHC: shape {q_latent_BTHC.shape} must be [batch, token, head, rank]"
        )
    batch_size, num_tokens, num_heads, _ = q_latent_BTHC.shape
    rows = (batch_size, num_tokens, num_heads)
    _check_shape("q_latent_BTHC", q_latent_BTHC, (*rows, pages.latent.shape[-1]))
    _check_rope("q_rope_BTHR", q_rope_BTHR, rows, pages)
    if q_rope_BTHR.dtype != q_latent_BTHC.dtype:
        raise ValueError(
            f"q_rope_BTHR: dtype {q_rope_BTHR.dtype} must be q_latent_BTHC's, {q_latent_BTHC.dtype}"
        )
    _check_indices(page_table_BP, batch_size)
    _check_lengths("lengths_B", lengths_B, batch_size)


def _check_shape(name: str, array: Array, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"{name}: shape {array.shape} must be {shape}")


def _check_rope(name: str, array: Array, rows: tuple[int, ...], pages: LatentPages) -> None:
    lanes, dims = pages.rope.shape[-1], array.shape[-1]
    if array.shape != (*rows, dims) or lanes not in (dims, -(-dims // TPU_LANES) * TPU_LANES):
        raise ValueError(
            f"{name}: shape {array.shape} must be {(*rows, lanes)}, or narrower in the last "
            f"dim where pages.rope is padded to whole {TPU_LANES} lanes"
        )


def _check_indices(page_table_BP: Array, batch_size: int) -> None:
    if page_table_BP.ndim != 2 or page_table_BP.shape[0] != batch_size:
        raise ValueError(
            f"page_table_BP: shape {page_table_BP.shape} must be [{batch_size}, pages]"
        )
    if not jnp.issubdtype(page_table_BP.dtype, jnp.integer):
        raise ValueError(f"page_table_BP: dtype {page_table_BP.dtype} must be an integer")


def _check_lengths(name: str, array: Array, batch_size: int) -> None:
    _check_shape(name, array, (batch_size,))
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name}: dtype {array.dtype} must be an integer")
