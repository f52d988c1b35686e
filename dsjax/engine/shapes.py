"""The static sizes that an engine has programs for: few, so that all are compiled at its start."""

from __future__ import annotations

from dataclasses import dataclass

from dsjax.config import AttentionConfig
from dsjax.engine.programs import ChoiceShape, RowShape
from dsjax.engine.state import ChunkShape
from dsjax.layers.attention import costs_less_absorbed


@dataclass(frozen=True)
class Shapes:
    """All shapes of rows and of choices.

    Attributes:
        decode_sizes: sequences of a lane's step that only decodes, rising; may be empty.
        most_rows: room for all that a lane decodes at once.
        chunks: room for pieces of prompts.
        num_lanes: rows of a step.
        prompt_logprobs: whether prompts may get log-probabilities.
        first_chunks: those of which a step that begins all its prompts has a shape of its own.
    """

    decode_sizes: tuple[int, ...]
    most_rows: int
    chunks: tuple[ChunkShape, ...]
    num_lanes: int = 1
    prompt_logprobs: bool = False
    first_chunks: tuple[ChunkShape, ...] = ()

    def row(
        self,
        num_decoding: int,
        chunk: ChunkShape | None,
        num_chosen: int,
        prompt_logprobs: bool,
        is_first: bool,
    ) -> RowShape:
        """Returns the shape for a step.

        Args:
            num_decoding: sequences that decode, of the lane that has most.
            chunk: room for pieces, or None.
            num_chosen: tokens chosen after it, likewise.
            prompt_logprobs: whether a piece gets log-probabilities.
            is_first: whether all pieces begin their prompts.
        """
        sizes = self.decode_sizes
        if chunk is None and sizes:
            size = next(size for size in sizes if size >= num_decoding)
            return RowShape(size, None, size, num_rows=self.num_lanes)
        chunk = chunk or min(self.chunks, key=lambda shape: shape.row_tokens)
        # Room for all that decode costs little beside many tokens of prompts.
        few = sizes and max(num_decoding, num_chosen) <= sizes[0] and not prompt_logprobs
        few = few and chunk.row_tokens < 2 * self.most_rows
        size = sizes[0] if few else self.most_rows
        is_first &= chunk in self.first_chunks and not prompt_logprobs
        return RowShape(size, chunk, size, prompt_logprobs, self.num_lanes, is_first)

    def rows(self) -> list[RowShape]:
        """Returns all shapes of rows that the engine ever reads."""
        shapes = [self.row(size, None, size, False, False) for size in self.decode_sizes]
        wants = (False, True) if self.prompt_logprobs else (False,)
        beside = [(0, False), *((self.most_rows, want) for want in wants)]
        shapes += [
            self.row(count, chunk, count, want, is_first)
            for chunk in self.chunks
            for count, want in beside
            for is_first in (False, True)
        ]
        return list(dict.fromkeys(shapes))

    def choice(self, wanted: ChoiceShape) -> ChoiceShape:
        """Returns the compiled shape that does at least as much; there are four kinds."""
        draws = wanted.draws or wanted.changes
        limits = (draws and wanted.limits) or wanted.changes
        return wanted._replace(draws=draws, limits=limits)

    def choices(self) -> list[ChoiceShape]:
        """Returns all shapes of choices that the engine ever makes."""
        kinds = [(False, False, False), (True, False, False), (True, True, False)]
        kinds.append((True, True, True))
        return [
            ChoiceShape(size * self.num_lanes, *kind, logprobs)
            for size in sorted({*self.decode_sizes, self.most_rows})
            for kind in kinds
            for logprobs in (False, True)
        ]


def first_chunks(config: AttentionConfig, chunks: tuple[ChunkShape, ...]) -> tuple[ChunkShape, ...]:
    """Returns the chunks that expand what is cached before them, unless nothing is."""
    return tuple(c for c in chunks if not costs_less_absorbed(config, c.num_tokens))
