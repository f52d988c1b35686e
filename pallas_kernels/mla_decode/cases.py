"""The shapes of absorbed decode: those that values are checked on, and those that are timed."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from pallas_kernels.mla_decode.limits import KV_RANK, ROPE_DIM
from pallas_kernels.mla_decode.pages import LatentPages
from pallas_kernels.quantised import row_scaled


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape; the arrays are drawn afresh from a seed."""

    name: str
    lengths: tuple[int, ...]  # Tokens of each sequence, the queries included.
    num_tokens: int = 1  # Query tokens per sequence.
    num_heads: int = 16
    page_size: int = 64
    extra_pages: int = 1  # Columns of the page table past the longest sequence.
    sharpness: float = 2  # Size of the queries; the largest score is about five times as large.
    table_pages: int = 0  # Columns of the page table, where it holds only a part of the sequence.

    @property
    def scale(self) -> float:
        """The model's: one over the root of the number of dims of a score."""
        return 192**-0.5

    def draw(
        self,
        seed: int,
        dtype: DTypeLike = jnp.float32,
        pages_dtype: DTypeLike | None = None,
        dims: tuple[int, int] = (KV_RANK, ROPE_DIM),
        unused: float = 100,
    ) -> tuple[Array, Array, LatentPages, Array, Array]:
        """Returns the arguments of `mla_decode`: (q_latent, q_rope, pages, page_table, lengths).

        The pages of the sequences are scattered over a pool. The unused ones, and the slots
        after each sequence's end, hold numbers times `unused`. The table's unused entries are
        random.
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
        latent[~used] *= unused
        rope[~used] *= unused

        pages_dtype = jnp.dtype(pages_dtype or dtype)
        values, scale = jnp.asarray(latent), None
        if pages_dtype.itemsize == 1:
            values, scale = row_scaled(values, pages_dtype)
            scale = jnp.where(used, scale, unused * scale)
        pages = LatentPages(values.astype(pages_dtype), jnp.asarray(rope, dtype), scale)
        # Sharp enough that a few keys carry most of the weight, as in a trained model.
        q_latent = jnp.asarray(self.sharpness * rng.normal(size=(B, T, H, C)), dtype)
        q_rope = jnp.asarray(self.sharpness * rng.normal(size=(B, T, H, R)), dtype)
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
    Case("turn_of_a_conversation", (40, 300), num_tokens=32),
    Case("three_queries_64_heads", (190, 64), num_tokens=3, num_heads=64),
    Case("128_heads", (130, 65, 0), num_heads=128),
    Case("128_heads_two_queries", (129, 257), num_tokens=2, num_heads=128),
    Case("pages_of_128", (100, 300, 128), page_size=128),
    Case("table_is_full", (256, 320), extra_pages=0),
    Case("part_of_the_sequence", (500, 100, -3, -200), num_tokens=2, table_pages=4),
    Case("long", (3000,), num_heads=16),
    Case("long_128_heads", (1500, 2100), num_heads=128),
    # Lengths past a table that is not whole blocks of any implementation.
    Case("past_the_table", (2113, 2112, 2600, 70), table_pages=33),
    Case("scores_of_hundreds", (300, 70, 5), num_tokens=2, sharpness=60),
    Case("queries_past_the_table", (321, 323, 322, 400), num_tokens=3, table_pages=5),
)

# Shapes that a kernel need not take; reference and xla do.
ODD_CASES = (
    Case("one_head", (70, 3), num_heads=1, page_size=16),
    Case("five_heads", (33, 0, 90), num_heads=5, num_tokens=2, page_size=8),
    Case("pages_of_one", (9, 4), num_heads=4, page_size=1),
)


@dataclasses.dataclass(frozen=True)
class Timed:
    """A shape that is timed: sequences of one length, or of lengths around it."""

    batch: int
    heads: int
    length: int
    tokens: int = 1
    ragged: bool = False
    page_size: int = 64
    quantised: str | None = None  # The latents' dtype, where they have 8 bits.

    @property
    def name(self) -> str:
        """Its name on the command line."""
        name = f"b{self.batch}_h{self.heads}_s{self.length}"
        name += f"_t{self.tokens}" if self.tokens > 1 else ""
        return name + "_ragged" * self.ragged + (f"_{self.quantised}" if self.quantised else "")

    @property
    def key_bytes(self) -> int:
        """Bytes of a token in the cache."""
        if self.quantised:
            return KV_RANK + 2 * ROPE_DIM + 4
        return 2 * (KV_RANK + ROPE_DIM)

    @property
    def flops(self) -> int:
        """Operations that the scores and the outputs take."""
        return self.batch * self.heads * self.tokens * 2 * self.length * (2 * KV_RANK + ROPE_DIM)

    @property
    def num_bytes(self) -> int:
        """Bytes that must be moved."""
        rows = self.tokens * self.heads
        return self.batch * (2 * rows * (2 * KV_RANK + ROPE_DIM) + self.length * self.key_bytes)


TIMED = (
    Timed(128, 128, 4096),
    Timed(128, 128, 8192),
    Timed(128, 128, 8192, tokens=2),
    Timed(128, 64, 8192),
    Timed(128, 16, 4096),
    Timed(128, 16, 8192),
    Timed(128, 16, 8192, tokens=2),
    Timed(128, 16, 8192, ragged=True),
    Timed(1, 16, 8192),
    Timed(1, 16, 131072),
    Timed(1, 128, 131072),
    Timed(32, 16, 2048),
    Timed(128, 16, 8192, quantised="int8"),
    Timed(128, 16, 8192, quantised="float8_e4m3fn"),
    Timed(128, 128, 8192, quantised="int8"),
)
