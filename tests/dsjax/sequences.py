"""Sequences in a latent pool, fed part by part, as tests want them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsjax.cache import LatentPool, Part, View, allocate_pool
from dsjax.model import DeepSeekV2

_extend = jax.jit(
    lambda graphdef, state, *arguments: nnx.merge(graphdef, state).extend(*arguments),
    static_argnums=0,
)


class Sequences:
    """A pool with room for some sequences, each with its own pages of it.

    Attributes:
        pool: the pool.
        lengths: tokens of each sequence that it holds.
    """

    def __init__(self, model: DeepSeekV2, count: int, max_length: int, page_size: int = 8) -> None:
        pages = -(-max_length // page_size)
        options = model.options
        self.pool: LatentPool = allocate_pool(
            model.config,
            count * pages,
            options.latent_dtype,
            page_size=page_size,
            rope_dtype=options.dtype,
        )
        self.lengths = np.zeros(count, np.int32)
        self._split = nnx.split(model)
        # Pages of a sequence lie anywhere.
        order = np.random.default_rng(0).permutation(count * pages)
        self._table = jnp.asarray(order.reshape(count, pages), jnp.int32)

    def part(
        self, rows: Sequence[int], counts: Sequence[int], num_tokens: int, *, is_first: bool = False
    ) -> Part:
        """Returns a part of `num_tokens` tokens of each row's sequence, `counts` of them real."""
        index = np.asarray(rows)
        return Part(
            self._table[index],
            jnp.asarray(self.lengths[index]),
            jnp.asarray(counts, jnp.int32),
            num_tokens,
            is_first,
        )

    def extend(
        self, parts: Sequence[Part], rows: Sequence[Sequence[int]], tokens: np.ndarray
    ) -> list[jax.Array]:
        """Feeds the next tokens of the parts' sequences.

        Args:
            parts: what `part` gave.
            rows: the rows of each part.
            tokens: [sequences, length], all tokens that the sequences will ever have.

        Returns:
            Of each part, logits [B, T, W]; those of padding mean nothing.
        """
        row = []
        for part, index in zip(parts, rows, strict=True):
            at = self.lengths[np.asarray(index)][:, None] + np.arange(part.num_tokens)
            real = np.asarray(part.mask())
            last = tokens.shape[1] - 1
            taken = tokens[np.asarray(index)[:, None], np.minimum(at, last)]
            row.append(np.where(real, taken, 7).reshape(-1))  # 7: any token pads
        view = View(tuple(parts))
        flat = jnp.asarray(np.concatenate(row), jnp.int32)
        logits, self.pool = _extend(*self._split, flat, self.pool, view, jnp.arange(flat.size))
        for part, index in zip(parts, rows, strict=True):
            np.add.at(self.lengths, np.asarray(index), np.asarray(part.num_new_B))
        return [
            logits[first : first + part.total_tokens].reshape(
                part.num_sequences, part.num_tokens, -1
            )
            for part, first in view.places()
        ]

    def step(
        self, tokens: np.ndarray, counts: Sequence[int], *, is_first: bool = False
    ) -> jax.Array:
        """Feeds `counts` next tokens of every sequence as one part; returns its logits."""
        rows = range(len(self.lengths))
        part = self.part(rows, counts, int(max(counts)), is_first=is_first)
        return self.extend([part], [rows], tokens)[0]
