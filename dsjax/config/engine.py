"""What an engine has room for, and the shapes that it compiles."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dsjax.config.fitting import checked
from dsjax.config.model import require, require_positive

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def memory_bytes(given: str | int) -> int:
    """Returns the bytes that a size such as "16GiB" or "16 GB" means.

    Raises:
        ValueError: it means none.
    """
    parts = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(given).strip(), re.IGNORECASE)
    unit = None if parts is None else _UNITS.get(parts[2].upper())
    found = 0 if parts is None or unit is None else int(float(parts[1]) * unit)
    require(found > 0, "device_memory", given, "must be a size such as 16GiB")
    return found


@checked
@dataclass(frozen=True)
class EngineConfig:
    """Sizes of an engine; those left out follow from the model and the device.

    Attributes:
        max_batch: sequences that run at once.
        batch_sizes: numbers of sequences for which a step without prompts is compiled; None takes
            `max_batch` and its quarters. Empty, every step has room for a prompt: with one shape
            of chunk and no shared prefixes, a text is then the same to the last bit whatever runs
            beside it.
        chunk_tokens: prompt tokens that a step reads at most, on each device with own sequences.
        chunks: shapes of the room for prompts, of which a step has one: (sequences, tokens of
            each). None takes five that `chunk_tokens` gives.
        max_length: tokens of a sequence, prompt and text; None takes the model's.
        num_pages: pages of a device's latent pool; None takes what fits into `memory_fraction`.
        page_size: tokens that a device has of a page. Devices that divide heads have so many each,
            and prefixes are shared by whole pages.
        memory_fraction: of the device's memory, for weights, pool and computation together.
        share_prefixes: whether what the pool holds serves other prompts that begin alike.
        max_waiting: requests that may wait; one more is refused.
        warm_up: whether all programs are compiled before the first request, and none after.
        prompt_logprobs: whether requests may ask for them, which is one more program a chunk.
    """

    max_batch: int = 64
    batch_sizes: tuple[int, ...] | None = None
    chunk_tokens: int = 2048
    chunks: tuple[tuple[int, int], ...] | None = None
    max_length: int | None = None
    num_pages: int | None = None
    page_size: int = 64
    memory_fraction: float = 0.9
    share_prefixes: bool = True
    max_waiting: int = 100_000
    warm_up: bool = True
    prompt_logprobs: bool = True

    def __post_init__(self) -> None:
        names = ("max_batch", "chunk_tokens", "max_length", "num_pages", "page_size", "max_waiting")
        for name in names:
            value = getattr(self, name)
            whole = value is None or (isinstance(value, int) and not isinstance(value, bool))
            require(whole, f"engine.{name}", value, "must be a whole number")
        require_positive("engine", **{name: getattr(self, name) for name in names})
        fraction = self.memory_fraction
        require(0 < fraction <= 1, "engine.memory_fraction", fraction, "must be in (0, 1]")
        sizes = self.batch_sizes
        if sizes:
            fits = list(sizes) == sorted(set(sizes)) and sizes[0] > 0
            fits = fits and sizes[-1] == self.max_batch
            require(fits, "engine.batch_sizes", sizes, f"must rise to max_batch={self.max_batch}")
        for chunk in self.chunks or ():
            fits = len(chunk) == 2 and min(chunk) > 0
            require(fits, "engine.chunks", self.chunks, "must be (sequences, tokens) of 1 or more")
        require(self.chunks != (), "engine.chunks", self.chunks, "must not be empty")

    def decode_sizes(self) -> tuple[int, ...]:
        """Returns the batch sizes of decoding steps, rising."""
        if self.batch_sizes is not None:
            return self.batch_sizes
        sizes = [self.max_batch]
        while sizes[-1] > 4:
            sizes.append(-(-sizes[-1] // 4))
        if sizes[-1] > 1:
            sizes.append(1)
        return tuple(reversed(sizes))

    def chunk_shapes(self) -> tuple[tuple[int, int], ...]:
        """Returns the shapes of the room for prompts: one long prompt to many short ones.

        The first is for what a turn of a conversation adds: so few tokens that the models' latent
        attention need not expand what is cached before them.
        """
        if self.chunks is not None:
            return self.chunks
        whole, half, short = (max(1, self.chunk_tokens // parts) for parts in (1, 2, 8))
        shapes = ((1, min(64, short)), (1, short), (min(8, self.max_batch), short))
        return tuple(dict.fromkeys((*shapes, (min(2, self.max_batch), half), (1, whole))))
