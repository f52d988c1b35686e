"""The shapes of the local permutation: those that values are checked on, and those that lower."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """Tokens of a width, each with so many experts; some of them are dropped."""

    name: str
    tokens: int
    width: int
    num_experts: int
    top_k: int = 3
    max_rows: int | None = None
    dropped: float = 0  # Share of the assignments that go nowhere, besides one expert's worth.

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Returns int32 experts of each token, `num_experts` for an assignment that is dropped."""
        shape = (self.tokens, self.top_k)
        indices = rng.integers(0, self.num_experts + 1, shape).astype(np.int32)
        indices[rng.random(shape) < self.dropped] = self.num_experts
        return indices

    def __str__(self) -> str:
        return self.name


# With room for all rows, or for those that there are, without those of dropped assignments.
CASES = (
    Case("all_rows", 40, 5, 6, dropped=0.5),
    Case("few_rows", 40, 5, 6, max_rows=60, dropped=0.5),
)
# For the kernel, which takes a width of whole warpgroups. No block divides the tokens.
KERNEL_CASES = (
    Case("all_rows", 7, 256, 6, dropped=0.4),
    Case("few_rows", 7, 256, 6, max_rows=15, dropped=0.4),
)
# Widths of V2-Lite and of V2.
MODELS = (Case("v2_lite", 32768, 2048, 64, top_k=6), Case("v2", 32768, 5120, 160, top_k=6))
