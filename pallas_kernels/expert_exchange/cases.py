"""The shapes of the expert exchange: those that values are checked on, and those that are timed."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """Tokens of every shard, and how their experts are drawn.

    Attributes:
        name: "random"; "one_shard", where every row goes to one device; "dropped", where a shard
            sends nothing and others little; or "nothing".
        tokens: tokens of each shard.
        width: numbers in a token.
        num_experts: experts of all shards; as an expert, an assignment that was dropped.
        top_k: experts of a token.
        max_shards: bound on the shards that a token goes to.
    """

    name: str
    tokens: int = 7
    width: int = 5
    num_experts: int = 12
    top_k: int = 3
    max_shards: int = 3

    def draw(self, rng: np.random.Generator, num_shards: int) -> np.ndarray:
        """Returns int32 experts of the tokens of all shards, [shards * tokens, top_k]."""
        experts, tokens = self.num_experts, num_shards * self.tokens
        indices = np.stack([rng.permutation(experts)[: self.top_k] for _ in range(tokens)])
        if self.name == "one_shard":
            indices = np.stack([experts // 2 + rng.permutation(3)[: self.top_k] for _ in indices])
        if self.name == "dropped":
            indices[rng.random(indices.shape) < 0.4] = experts
            indices[self.tokens : 2 * self.tokens] = experts
        if self.name == "nothing":
            indices[:] = experts
        return indices.astype(np.int32)

    def __str__(self) -> str:
        return self.name


CASES = tuple(map(Case, ("random", "one_shard", "dropped", "nothing")))
# Tokens of a device and their width: V2's.
TIMED_TOKENS, TIMED_WIDTH = 16384, 5120
# Devices that share the experts of a pod, whose bytes are counted.
POD_SHARDS = (4, 8, 16)
