"""What each implementation of absorbed decode takes."""

import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.chips import TPU_LANES
from pallas_kernels.implementations import (
    IMPLEMENTATIONS,
    check_choice,
    first_reason,
    not_equal,
    not_multiple,
    too_large,
    wrong_chip,
    wrong_dtype,
)
from pallas_kernels.quantised import QUANTISED_DTYPES

# Of the Hopper kernels: numbers in a latent and in a rotary key.
KV_RANK, ROPE_DIM = 512, 64
# Keys of a block of the Hopper kernels: a page of 64, or a part of a larger page.
HOPPER_KEYS = 64
HOPPER_ROWS = 8  # What the number of query rows must divide by: shared memory is cut into eights.
TPU_PAGE_ROWS = 32  # Rows of a TPU's register of 8-bit latents.
TPU_MAX_ROWS = 512
# int32 entries of the page table that a call takes: half of the megabyte of scalar memory. Of more
# sequences a call takes a part.
TPU_MAX_TABLE = 131072


def supported(
    implementation: str,
    *,
    kv_rank: int,
    rope_dim: int,
    num_heads: int,
    num_tokens: int = 1,
    page_size: int,
    table_pages: int = 0,
    dtype: DTypeLike,
    pages_dtype: DTypeLike | None = None,
    rope_dtype: DTypeLike | None = None,
    chip: str | None = None,
) -> str | None:
    """Says whether an implementation takes these sizes.

    Args:
        implementation: one of IMPLEMENTATIONS.
        kv_rank: C, numbers in a latent.
        rope_dim: R, numbers in a rotary key as the pool stores it, padding included.
        num_heads: H, heads of the queries of one call (of one tensor shard).
        num_tokens: T, query tokens of a sequence.
        page_size: tokens in a page.
        table_pages: P, columns of the page table; 0 where they are not known.
        dtype: dtype of the queries.
        pages_dtype: dtype of the pool's latents; None for that of the queries.
        rope_dtype: dtype of the pool's rotary keys; None for that of the queries.
        chip: the chip to run on, as `chips.chip_of` names it; None for one that fits.

    Returns:
        None, or one line that names what is to blame.

    Raises:
        ValueError: an unknown implementation.
    """
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    rows, rows_name = num_tokens * num_heads, f"query rows {num_tokens} x {num_heads} ="
    if implementation == "tpu":
        return first_reason(
            wrong_chip(implementation, chip),
            wrong_dtype("dtype", dtype, (jnp.bfloat16, jnp.float32)),
            not_multiple("kv rank", kv_rank, TPU_LANES),
            too_large(rows_name, rows, TPU_MAX_ROWS),
            not_multiple("page size", page_size, TPU_PAGE_ROWS),
            too_large("page table columns", table_pages, TPU_MAX_TABLE),
        )
    if implementation == "hopper":
        pages_dtypes = (jnp.bfloat16, *QUANTISED_DTYPES)
        return first_reason(
            wrong_chip(implementation, chip),
            wrong_dtype("dtype", dtype, (jnp.bfloat16,)),
            wrong_dtype("pages dtype", dtype if pages_dtype is None else pages_dtype, pages_dtypes),
            wrong_dtype("rope dtype", dtype if rope_dtype is None else rope_dtype, (jnp.bfloat16,)),
            not_equal("kv rank", kv_rank, KV_RANK),
            not_equal("rope dim", rope_dim, ROPE_DIM),
            not_multiple("page size", page_size, HOPPER_KEYS),
            not_multiple(rows_name, rows, HOPPER_ROWS),
        )
    return None
