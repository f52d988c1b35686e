"""What one call reads and writes of the pool: the parts of one or several rows of tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Part:
    """B sequences with T tokens each, which lie one after the other in a row.

    Where there are several rows, B counts the sequences of all, those of the first row first.

    Attributes:
        page_table_BP: int32, pages of each sequence within a layer.
        lengths_B: int32, tokens of each sequence that the pool holds before this call.
        num_new_B: int32, how many of the T tokens are real; the others come last and are padding.
        num_tokens: T.
        is_first: whether the pool holds nothing of any of these sequences, so that their tokens
            attend to one another alone.
    """

    page_table_BP: jax.Array
    lengths_B: jax.Array
    num_new_B: jax.Array
    num_tokens: int = dataclasses.field(metadata={"static": True})
    is_first: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def num_sequences(self) -> int:
        """B."""
        return self.lengths_B.shape[0]

    @property
    def total_tokens(self) -> int:
        """Tokens that are this part, padding included."""
        return self.num_sequences * self.num_tokens

    def positions(self) -> jax.Array:
        """Returns the position of each token in its sequence, int32 [B, T]."""
        return self.lengths_B[:, None] + jnp.arange(self.num_tokens, dtype=jnp.int32)

    def mask(self) -> jax.Array:
        """Returns bool [B, T], False for padding."""
        return jnp.arange(self.num_tokens) < self.num_new_B[:, None]

    def advanced(self) -> Part:
        """Returns the part whose tokens the pool holds now."""
        return dataclasses.replace(self, lengths_B=self.lengths_B + self.num_new_B)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class View:
    """The parts of a row of tokens, in their order.

    Sequences that decode are one part, of one to a few tokens each; chunks of prompts are others.

    Attributes:
        parts: the parts.
        num_rows: rows of equal parts: one for each of the devices that divide the pool's pages,
            which alone knows the pages of its sequences.
    """

    parts: tuple[Part, ...]
    num_rows: int = dataclasses.field(default=1, metadata={"static": True})

    @property
    def row_tokens(self) -> int:
        """Tokens of a row, padding included."""
        return sum(part.total_tokens for part in self.parts) // self.num_rows

    def places(self) -> Iterator[tuple[Part, int]]:
        """Yields each part with the place of its first token in a row."""
        first = 0
        for part in self.parts:
            yield part, first
            first += part.total_tokens // self.num_rows

    def positions(self) -> jax.Array:
        """Returns the position of each token in its sequence, int32 [rows, tokens of a row]."""
        return self._joined([part.positions() for part in self.parts])

    def mask(self) -> jax.Array:
        """Returns bool for each token, False for padding: [rows, tokens of a row]."""
        return self._joined([part.mask() for part in self.parts])

    def _joined(self, arrays: list[jax.Array]) -> jax.Array:
        return jnp.concatenate([array.reshape(self.num_rows, -1) for array in arrays], axis=1)
