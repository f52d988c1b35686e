"""The work of a Hopper decode: cut into equal parts, and the pieces of a sequence merged again."""

import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from pallas_kernels.hopper_parts import COMPILER_PARAMS
from pallas_kernels.mla_decode.limits import KV_RANK
from pallas_kernels.mla_decode.tiles import HopperTile
from pallas_kernels.softmax import LOG2E, MASKED

GROUPS = 8  # Of sequences, which `find_share` sums side by side.
STEPS = 4  # Of its ways through a group that do not wait for a branch.
UNIT = 128  # Keys of the unit of work: two blocks of 64.


def plan_work(
    lengths_B: Int[Array, " B"], capacity: int, num_parts: int
) -> tuple[Int[Array, " B+1"], Int[Array, " bounds"]]:
    """Lays the units of all sequences end to end and finds where each part of the work begins.

    A sequence has one unit per 128 keys and at least one, so that an empty one is written too.
    `part_bound` cuts the units into parts; the piece of sequence b that lies in part p has the slot
    p + b: along the walk through parts and sequences these never repeat, and the pieces of one
    sequence are consecutive.

    Args:
        lengths_B: tokens of each sequence.
        capacity: keys that the page table has room for.
        num_parts: parts to cut.

    Returns:
        (starts, firsts): the number of units before each sequence, their total last; and the
        sequence that each part's first unit lies in, last that of the end, the batch size.
    """
    # Sums over comparisons rather than cumsum and searchsorted: XLA fuses each into one kernel.
    batch_size = lengths_B.shape[0]
    units_B = num_units(lengths_B, capacity, UNIT)
    before_SB = jnp.arange(batch_size) < jnp.arange(batch_size + 1)[:, None]
    starts_S = jnp.sum(units_B * before_SB, axis=1, dtype=jnp.int32)
    bounds_P = part_bound(jnp.arange(num_parts + 1), starts_S[-1], num_parts)
    firsts_P = jnp.sum(starts_S[1:] <= bounds_P[:, None], axis=1, dtype=jnp.int32)
    return starts_S, firsts_P


class Share(NamedTuple):
    """A part's share of the units, int32 scalars.

    Attributes:
        total: units of all sequences.
        begin: the part's first unit.
        end: one past its last.
        first_sequence: the sequence that its first unit lies in.
        end_sequence: one past the sequence that its last unit lies in.
        first_start: the first unit of `first_sequence`.
    """

    total: Array
    begin: Array
    end: Array
    first_sequence: Array
    end_sequence: Array
    first_start: Array


def find_share(
    lengths_ref: Any, batch_size: int, capacity: int, unit: int, part: Array, num_parts: int
) -> Share:
    """Finds a part's share as `plan_work` does, within a kernel.

    A thread finds it alone, so what counts is how many steps wait for each other: the sequences
    are summed in groups, side by side, and only the two groups in which the part begins and ends
    are walked through.
    """
    group = pl.cdiv(batch_size, GROUPS)
    zero = jnp.int32(0)

    def units_of(sequence: Array) -> Array:
        length = lengths_ref[jnp.minimum(sequence, batch_size - 1)]
        return jnp.where(sequence < batch_size, num_units(length, capacity, unit), 0)

    steps = pl.cdiv(group, STEPS)

    def add(i: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        def units(g: int, index: Array) -> Array:
            return jnp.where(index < group, units_of(g * group + index), 0)

        for j in range(STEPS):
            sums = tuple(sum_ + units(g, i * STEPS + j) for g, sum_ in enumerate(sums))
        return sums

    sums = lax.fori_loop(0, steps, add, (zero,) * GROUPS)
    stops = list(itertools.accumulate(sums))
    total = stops[-1]
    begin = part_bound(part, total, num_parts)
    end = part_bound(part + 1, total, num_parts)

    def enter(bound: Array) -> tuple[Array, Array]:
        """Returns the first sequence of the group in which a unit lies, and where that starts."""
        number, start = zero, zero
        for stop in stops:
            before = stop <= bound
            number += before.astype(jnp.int32)
            start = jnp.where(before, stop, start)
        return number * group, start

    # The sequences that stop at or before a unit: they are those before the one it lies in.
    bounds = begin, end - 1
    entries = [enter(bound) for bound in bounds]

    def walk(i: Array, carry: Any) -> Any:
        for j in range(STEPS):
            index = i * STEPS + j
            walked = []
            for bound, (first, _), (start, stop, passed) in zip(
                bounds, entries, carry, strict=True
            ):
                sequence = first + index
                stop += jnp.where(index < group, units_of(sequence), 0)
                inside = jnp.logical_and(index < group, sequence < batch_size)
                before = jnp.logical_and(inside, stop <= bound)
                start = jnp.where(before, stop, start)
                walked.append((start, stop, passed + before.astype(jnp.int32)))
            carry = tuple(walked)
        return carry

    carry = tuple((start, start, zero) for _, start in entries)
    found = lax.fori_loop(0, steps, walk, carry)
    (first_start, _, passed), (_, _, passed_last) = found
    first_sequence = jnp.minimum(entries[0][0] + passed, batch_size)
    end_sequence = jnp.minimum(entries[1][0] + passed_last + 1, batch_size)
    return Share(total, begin, end, first_sequence, end_sequence, first_start)


def num_units(length: Array, capacity: int, unit: int) -> Array:
    """Returns the units of a sequence: one at least."""
    return jnp.maximum(1, lax.div(jnp.clip(length, 0, capacity) + (unit - 1), jnp.int32(unit)))


def part_bound(part: Array, total: Array, num_parts: int) -> Array:
    """Returns the first unit of a part: equal shares, and no empty part before a part with work."""
    num_used = _num_used(total, num_parts)
    return lax.div(jnp.minimum(part, num_used) * total, num_used)


def part_of(unit: Array, total: Array, num_parts: int) -> Array:
    """Returns the part that a unit lies in, the inverse of `part_bound`."""
    num_used = _num_used(total, num_parts)
    return lax.div((unit + 1) * num_used - 1, total)


def _num_used(total: Array, num_parts: int) -> Array:
    """Returns the fewest parts whose largest is no larger: their bounds meet more sequences'."""
    largest = lax.div(total + (num_parts - 1), jnp.int32(num_parts))
    return lax.div(total + largest - 1, largest)


def merge_pieces(
    out_BMC: Array,
    lse_BM: Array,
    piece_out_WMC: Array,
    piece_lse_WM: Array,
    plan: tuple[Array, Array],
    num_rows: int,
    num_parts: int,
    tile: HopperTile,
) -> tuple[Array, Array]:
    """Writes the rows of the sequences that lie in several pieces into (out, lse), in place.

    Args:
        out_BMC: the rows of the sequences in one piece; the others are overwritten.
        lse_BM: their log-sum-exp.
        piece_out_WMC: each piece's normalised output, by slot.
        piece_lse_WM: its log-sum-exp.
        plan: what `plan_work` gave.
        num_rows: rows that count; the arrays may have more.
        num_parts: parts of the plan.
        tile: sizes of this kernel.

    Returns:
        (out_BMC, lse_BM) of all sequences.
    """
    batch_size = out_BMC.shape[0]
    # Few rows in all are spread over the chip; of many a block takes several.
    many = batch_size * num_rows >= 16 * tile.num_sms
    rows = math.gcd(tile.merge_rows, num_rows) if many else 1
    # The pieces of a sequence among equals; of longer ones they are taken in several steps.
    width = min(tile.merge_pieces, pl.cdiv(num_parts, batch_size) + 1)

    def body(
        starts_ref: Any, piece_out_gmem: Any, piece_lse_gmem: Any, out_gmem: Any, lse_gmem: Any
    ) -> None:
        sequence, first_row = lax.axis_index("sequence"), lax.axis_index("rows") * rows
        total = starts_ref[batch_size]
        first_part = part_of(starts_ref[sequence], total, num_parts)
        last_part = part_of(starts_ref[sequence + 1] - 1, total, num_parts)
        first_slot, num_pieces = first_part + sequence, last_part - first_part + 1

        @pl.when(num_pieces > 1)
        def _() -> None:
            for row in range(rows):

                def step(
                    i: Array, carry: tuple[Array, Array, Array], row: int = row
                ) -> tuple[Array, Array, Array]:
                    acc, top, total = carry
                    lses, values = [], []
                    for j in range(width):
                        index = i * width + j
                        slot = first_slot + jnp.minimum(index, num_pieces - 1)
                        lse = piece_lse_gmem[slot, first_row + row] * LOG2E
                        lses.append(jnp.where(index < num_pieces, lse, -jnp.inf))
                        values.append(
                            plgpu.load(
                                piece_out_gmem.at[slot, first_row + row],
                                layout=plgpu.Layout.WG_STRIDED((KV_RANK,), vec_size=4),
                            )
                        )
                    new_top = functools.reduce(jnp.maximum, lses, top)
                    decay = jnp.exp2(top - new_top)
                    acc, total = acc * decay, total * decay
                    for lse, value in zip(lses, values, strict=True):
                        weight = jnp.exp2(lse - new_top)
                        acc, total = acc + value * weight, total + weight
                    return acc, new_top, total

                zeros = plgpu.layout_cast(
                    jnp.zeros((KV_RANK,), jnp.float32),
                    plgpu.Layout.WG_STRIDED((KV_RANK,), vec_size=4),
                )
                steps = lax.div(num_pieces + (width - 1), width)
                acc, top, total = lax.fori_loop(
                    0, steps, step, (zeros, jnp.float32(MASKED), jnp.float32(0))
                )
                seen = total > 0
                acc *= jnp.where(seen, 1 / total, 0.0)
                out_gmem.at[sequence, first_row + row][...] = acc.astype(out_BMC.dtype)
                lse = top * (1 / LOG2E) + jnp.log(total)
                lse_gmem[sequence, first_row + row] = jnp.where(seen, lse, -jnp.inf)

    mesh = plgpu.Mesh(grid=(batch_size, num_rows // rows), grid_names=("sequence", "rows"))
    out_ref, lse_ref = jax.new_ref(out_BMC), jax.new_ref(lse_BM)
    pl.kernel(
        body,
        mesh=mesh,
        compiler_params=COMPILER_PARAMS,
    )(plan[0], piece_out_WMC, piece_lse_WM, out_ref, lse_ref)
    return jax.freeze(out_ref), jax.freeze(lse_ref)
