"""The shapes of the grouped matmul: those that values are checked on, and those that are timed."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of one call: rows, widths, rows of each group, first group held and how many."""

    name: str
    num_rows: int
    width_in: int
    width_out: int
    group_sizes: tuple[int, ...]
    offset: int | None = None
    num_held: int | None = None

    @property
    def held(self) -> int:
        """Groups that the right-hand side holds."""
        return len(self.group_sizes) if self.num_held is None else self.num_held

    def __str__(self) -> str:
        return self.name


# Every implementation is held to all of these.
CASES = (
    Case("even", 256, 128, 256, (64, 64, 64, 64)),
    Case("ragged", 500, 128, 128, (1, 130, 0, 77, 63, 129, 37, 63)),
    Case("empty_ends", 192, 128, 128, (0, 0, 100, 0, 92, 0)),
    Case("one_group_has_all", 300, 128, 128, (0, 300, 0, 0)),
    Case("all_empty", 64, 128, 128, (0, 0, 0)),
    Case("one_token", 1, 128, 256, (0, 0, 1, 0)),
    Case("one_row_each", 8, 256, 128, (1,) * 8),
    Case("sum_below_rows", 400, 128, 128, (30, 0, 95, 128)),
    Case("single_group", 130, 256, 128, (130,)),
    Case("larger_than_tiles", 900, 384, 384, (513, 257, 130)),
    Case("offset_middle", 320, 128, 128, (40, 33, 0, 90, 65, 20, 50, 22), offset=2, num_held=4),
    Case("offset_end", 320, 128, 128, (40, 33, 0, 90, 65, 20, 50, 2), offset=6, num_held=2),
)

# Widths that the Pallas kernels need not take; reference and xla do.
ODD_CASES = (
    Case("odd_widths", 50, 24, 40, (7, 0, 13, 25)),
    Case("tiny_experts", 500, 64, 96, (100, 3, 0, 150, 47, 60, 70, 70)),
)

# What Hopper's kernel of float8 products is held to besides: more rows than are few, and the last
# tiles of rows, columns and contraction partial.
FP8_CASES = (
    Case("fp8_ragged", 1000, 320, 448, (1, 330, 0, 177, 63, 229, 137, 63)),
    Case("fp8_one_has_all", 600, 128, 128, (0, 600, 0, 0)),
    Case("fp8_tail_of_none", 700, 256, 192, (130, 0, 295, 128)),
    Case("fp8_offset", 620, 384, 256, (40, 233, 0, 90, 65, 120, 50, 22), offset=2, num_held=4),
    Case("fp8_even", 2048, 512, 640, (512,) * 4),
)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Random float32 arrays of a case, rows outside the held groups included."""

    lhs: Array
    rhs: Array
    second_rhs: Array
    d_out: Array
    group_sizes: Array


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Draw the arrays of a case, scaled so that products are of order one."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int, scale: float = 1.0) -> Array:
        return jnp.asarray(rng.standard_normal(shape) * scale, jnp.float32)

    weights = (case.held, case.width_in, case.width_out)
    return Inputs(
        lhs=draw(case.num_rows, case.width_in),
        rhs=draw(*weights, scale=case.width_in**-0.5),
        second_rhs=draw(*weights, scale=case.width_in**-0.5),
        d_out=draw(case.num_rows, case.width_out),
        group_sizes=jnp.array(case.group_sizes, jnp.int32),
    )


class Training(NamedTuple):
    """A product of many rows that is timed."""

    num_experts: int
    width_in: int
    width_out: int
    num_rows: int


class Decode(NamedTuple):
    """A product of few tokens that is timed, at several numbers of tokens."""

    num_experts: int
    width_in: int
    width_out: int
    top_k: int
    weights_dtype: str
    tokens: tuple[int, ...]


# V2-Lite's sizes with gate and up side by side, then V2's.
TRAINING = (
    Training(64, 2048, 2816, 196608),
    Training(64, 2048, 2816, 49152),
    Training(64, 2048, 2816, 6144),
    Training(160, 5120, 3072, 98304),
    Training(160, 1536, 5120, 98304),
)
SWIGLU = (Training(64, 2048, 1408, 49152),)
DECODE = (
    Decode(64, 2048, 2816, 6, "bfloat16", (1, 32, 128)),
    Decode(64, 2048, 2816, 6, "int8", (1, 32, 128)),
    Decode(64, 2048, 2816, 6, "float8_e4m3fn", (32,)),
    Decode(160, 5120, 3072, 6, "bfloat16", (1, 8, 32, 128)),
    Decode(160, 1536, 5120, 6, "bfloat16", (1, 32, 128)),
)
# For the CPU.
PORTABLE = (Training(64, 256, 256, 128), Training(64, 256, 256, 1024))
