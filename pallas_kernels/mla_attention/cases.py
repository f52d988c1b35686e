"""The shapes of latent attention: those that values are checked on, and those that are timed."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape and mask; the arrays are drawn afresh from `seed`."""

    name: str
    batch: int = 1
    queries: int = 64
    keys: int = 64
    heads: int = 2
    causal: bool = True
    num_segments: int = 0  # Documents packed into each sequence; 0: no segment ids.
    offsets: tuple[int, ...] = ()  # One per sequence; (): none given.
    foreign_queries: int = 0  # Leading queries of a document that has no keys.
    sharpness: float = 1  # Factor of the queries: about a quarter of the largest score.

    @property
    def scale(self) -> float:
        """The model's: one over the root of the number of dims of a score."""
        return 192**-0.5

    def draw(
        self, seed: int, dtype: DTypeLike = jnp.float32, dims: tuple[int, int, int] = (128, 64, 128)
    ) -> tuple[tuple[Array, ...], tuple[Array | None, ...], Array]:
        """Returns five inputs, three optional masks, and the output's cotangent."""
        rng = np.random.default_rng(seed)
        N, R, V = dims
        B, T, S, H = self.batch, self.queries, self.keys, self.heads
        shapes = ((B, T, H, N), (B, T, H, R), (B, S, H, N), (B, S, R), (B, S, H, V), (B, T, H, V))
        *arrays, d_out = (
            jnp.asarray(rng.normal(size=shape).astype(np.float32), dtype) for shape in shapes
        )
        arrays[:2] = (array * self.sharpness for array in arrays[:2])
        masks: list[Array | None] = [None, None, None]
        if self.num_segments:
            k_ids = np.sort(rng.integers(0, self.num_segments, (B, S)), axis=1).astype(np.int32)
            first = S - T if S >= T else 0
            q_ids = np.resize(k_ids[:, first:], (B, T)) if S < T else k_ids[:, first:].copy()
            q_ids[:, : self.foreign_queries] = self.num_segments
            masks[:2] = jnp.asarray(q_ids), jnp.asarray(k_ids)
        if self.offsets:
            masks[2] = jnp.asarray(self.offsets, jnp.int32)
        return tuple(arrays), tuple(masks), d_out


CASES = (
    Case("one_token", queries=1, keys=1, heads=1),
    Case("63", queries=63, keys=63),
    Case("64", queries=64, keys=64),
    Case("65", batch=2, queries=65, keys=65),
    Case("127_full", queries=127, keys=127, causal=False),
    Case("128", queries=128, keys=128),
    Case("129_full", batch=2, queries=129, keys=129, heads=1, causal=False),
    Case("200", queries=200, keys=200, heads=3),
    Case("300", queries=300, keys=300, heads=1),
    Case("cross_full", queries=70, keys=190, causal=False),
    Case("more_queries_than_keys", queries=150, keys=90),
    Case("segments", batch=2, queries=130, keys=130, num_segments=3),
    Case("segments_full", queries=160, keys=160, causal=False, num_segments=4),
    Case("foreign", queries=140, keys=140, num_segments=2, foreign_queries=70),
    Case("offset", batch=2, queries=65, keys=200, offsets=(135, 20)),
    Case("offset_one_query", batch=3, queries=1, keys=129, offsets=(0, 64, 128)),
    Case("offset_negative", batch=2, queries=140, keys=140, offsets=(-70, -200)),
    Case("offset_segments", batch=2, queries=100, keys=260, num_segments=3, offsets=(160, 140)),
    Case("scores_of_hundreds", queries=200, keys=200, sharpness=100),
    Case("scores_of_a_thousand", queries=70, keys=190, offsets=(120,), sharpness=300),
    Case("fewer_queries_offset", queries=128, keys=256, num_segments=2, offsets=(128,)),
)

# Slow on a CPU; the last has V2's number of heads.
LARGE_CASES = (
    Case("1100", queries=1100, keys=1100, heads=2),
    Case("1100_full", queries=1100, keys=1100, heads=1, causal=False),
    Case("segments_1100", batch=2, queries=1100, keys=1100, heads=1, num_segments=5),
    Case("offset_1100", queries=600, keys=1100, heads=1, offsets=(500,)),
    Case("128_heads", queries=64, keys=64, heads=128),
)


class Timed(NamedTuple):
    """A causal sequence of one document, whose forward and backward pass are timed."""

    heads: int
    tokens: int


# V2-Lite's heads and V2's.
TIMED = (Timed(16, 4096), Timed(16, 16384), Timed(128, 4096))
