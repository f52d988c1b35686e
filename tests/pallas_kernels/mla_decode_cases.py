"""The inputs on which every implementation of absorbed decode is checked."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from pallas_kernels.mla_decode import LatentPages, quantize_latents

KV_RANK, ROPE_DIM = 512, 64


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape; the arrays are drawn afresh from a seed."""

    name: str
    lengths: tuple[int, ...]  # Tokens of each sequence, the queries included.
    num_tokens: int = 1  # Query tokens per sequence.
    num_heads: int = 16
    page_size: int = 64
    extra_pages: int = 1  # Columns of the page table past the longest sequence.
    table_pages: int = 0  # Columns of the page table, where it holds only a part of the sequence.

    @property
    def scale(self) -> float:
        """The model's: one over the root of the number of dims of a score."""
        return 192**-0.5

    def draw(self, seed, dtype=jnp.float32, pages_dtype=None, dims=(KV_RANK, ROPE_DIM)):
        """Returns the arguments of `mla_decode`: (q_latent, q_rope, pages, page_table, lengths).

        The pages of the sequences are scattered over a pool, the unused ones hold large numbers,
        and so do the slots behind each sequence's end; the table's unused entries are random.
        """
        rng = np.random.default_rng(seed)
        C, R = dims
        B, T, H = len(self.lengths), self.num_tokens, self.num_heads
        columns = self.table_pages or (
            -(-max(0, *self.lengths, 0) // self.page_size) + self.extra_pages
        )
        num_pages = B * columns + 3
        table = rng.permutation(num_pages)[: B * columns].reshape(B, columns).astype(np.int32)
        latent = rng.normal(size=(num_pages, self.page_size, C)).astype(np.float32)
        rope = rng.normal(size=(num_pages, self.page_size, R)).astype(np.float32)
        used = np.zeros((num_pages, self.page_size), bool)
        for b, length in enumerate(self.lengths):
            position = np.arange(min(max(length, 0), columns * self.page_size))
            used[table[b, position // self.page_size], position % self.page_size] = True
            table[b, -(-max(length, 0) // self.page_size) :] = rng.integers(0, num_pages)
        latent[~used] *= 100
        rope[~used] *= 100

        pages_dtype = jnp.dtype(pages_dtype or dtype)
        latent, scale = jnp.asarray(latent), None
        if pages_dtype.itemsize == 1:
            latent, scale = quantize_latents(latent, pages_dtype)
        pages = LatentPages(latent.astype(pages_dtype), jnp.asarray(rope, dtype), scale)
        # Sharp enough that a few keys carry most of the weight, as in a trained model.
        q_latent = jnp.asarray(2 * rng.normal(size=(B, T, H, C)), dtype)
        q_rope = jnp.asarray(2 * rng.normal(size=(B, T, H, R)), dtype)
        return q_latent, q_rope, pages, jnp.asarray(table), jnp.asarray(self.lengths, jnp.int32)


CASES = (
    Case("1", (1,)),
    Case("63_64_65", (63, 64, 65)),
    Case("127_128_129", (129, 127, 128), num_heads=32),
    Case("ragged", (700, 1, 64, 321)),
    Case("empty_sequences", (0, 130, 0, 5)),
    Case("all_empty", (0, 0)),
    Case("two_queries", (2, 65, 300), num_tokens=2),
    Case("four_queries", (64, 67, 200, 4), num_tokens=4),
    Case("fewer_tokens_than_queries", (1, 2, 0, 90), num_tokens=4),
    Case("three_queries_64_heads", (190, 64), num_tokens=3, num_heads=64),
    Case("128_heads", (130, 65, 0), num_heads=128),
    Case("128_heads_two_queries", (129, 257), num_tokens=2, num_heads=128),
    Case("pages_of_128", (100, 300, 128), page_size=128),
    Case("table_is_full", (256, 320), extra_pages=0),
    Case("part_of_the_sequence", (500, 100, -3, -200), num_tokens=2, table_pages=4),
    Case("long", (3000,), num_heads=16),
    Case("long_128_heads", (1500, 2100), num_heads=128),
)

# Shapes that a kernel need not take; reference and xla do.
ODD_CASES = (
    Case("one_head", (70, 3), num_heads=1, page_size=16),
    Case("five_heads", (33, 0, 90), num_heads=5, num_tokens=2, page_size=8),
    Case("pages_of_one", (9, 4), num_heads=4, page_size=1),
)
