"""What the scheduler knows of a text, and what it decides: plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from dsjax.engine.pages import ROOT


@dataclass(eq=False, slots=True)
class Sequence:
    """One text that is being made.

    Attributes:
        tokens: the prompt, and the tokens after it that are known to the host.
        num_prompt: tokens of the prompt.
        max_tokens: tokens after it at most.
        priority: the lower, the sooner.
        num_cached: tokens whose latents the pool holds, or will hold after the steps under way.
        num_pending: tokens that have been chosen on the device and are not known yet.
        pages: of the pool, in order.
        slot: row of the device's tables, while it runs.
        lane: which of the devices that have pages of their own it runs on.
        is_finished: whether it has ended, so that what is pending is of no interest.
        num_preemptions: how often it had to give up its pages.
        num_shared: prompt tokens that were found in the pool.
        shares: whether its beginning may be taken from the pool, rather than read.
    """

    tokens: list[int]
    num_prompt: int
    max_tokens: int
    priority: int = 0
    num_cached: int = 0
    num_pending: int = 0
    pages: list[int] = field(default_factory=list)
    slot: int | None = None
    lane: int = 0
    is_finished: bool = False
    num_preemptions: int = 0
    num_shared: int = 0
    shares: bool = True
    rank: tuple[int, int] = (0, 0)
    # Pages that can be found by content, and the prefix that ends with the last of them.
    num_remembered: int = 0
    prefix: int = ROOT
    # Whether the newest token lies in the device's table, so that the host need not know it.
    on_device: bool = False
    # Pages that the device's table has.
    num_tabled: int = 0
    waiting_since: int = 0

    @property
    def length(self) -> int:
        """Tokens that there are, known or not."""
        return len(self.tokens) + self.num_pending

    @property
    def wants_more(self) -> bool:
        """Whether another token may follow those that there are."""
        num_made = len(self.tokens) + self.num_pending - self.num_prompt
        return not self.is_finished and num_made < self.max_tokens

    @property
    def decodes(self) -> bool:
        """Whether the newest token alone is left to be read, and lies on the device."""
        return self.on_device and len(self.tokens) + self.num_pending - self.num_cached == 1


class Piece(NamedTuple):
    """Tokens of one sequence to be read in a step.

    Attributes:
        sequence: whose.
        start: place of the first of them.
        num_tokens: how many.
    """

    sequence: Sequence
    start: int
    num_tokens: int


class ChunkShape(NamedTuple):
    """Room of a step for pieces of prompts: sequences, and tokens of each."""

    num_sequences: int
    num_tokens: int

    @property
    def row_tokens(self) -> int:
        """Tokens of the row that it takes."""
        return self.num_sequences * self.num_tokens


@dataclass
class Step:
    """What the device does next.

    Attributes:
        decoding: sequences that read their newest token, which lies on the device.
        pieces: of prompts.
        chunk: the room that the pieces lie in; None where there are none.
        new_pages: (slot, column, page) to be set in the table of pages first.
        samples: sequences that get their next token after it.
        started: sequences that have a slot since this step.
    """

    decoding: list[Sequence]
    pieces: list[Piece]
    chunk: ChunkShape | None
    new_pages: list[tuple[int, int, int]]
    samples: list[Sequence]
    started: list[Sequence]


@dataclass(frozen=True)
class Limits:
    """Sizes that a scheduler keeps to.

    Attributes:
        max_batch: sequences that run at once.
        max_length: tokens of a sequence at most.
        chunks: shapes of the room for pieces, of which a step has one.
        ageing: steps of waiting that make up for one of priority.
        patience: steps that the first in the queue lets others past, where only it does not fit.
    """

    max_batch: int
    max_length: int
    chunks: tuple[ChunkShape, ...]
    ageing: int = 256
    patience: int = 64
