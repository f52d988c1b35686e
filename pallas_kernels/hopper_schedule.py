"""How blocks take tiles on Hopper: in turn, or as each asks for its next one."""

from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array, lax
from jax._src.lib.mlir.dialects import llvm  # jax.extend.mlir leaves this dialect out
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, memref


def raster(local: Array, rows: Array | int, columns: int, band: int) -> tuple[Array, Array]:
    """Row and column of a tile: down the rows of a band, then over the columns, then the next band.

    Tiles that run at one time then share both their rows and their weights in L2.
    """
    index = lax.div(local, band * columns)
    local = lax.rem(local, band * columns)
    height = jnp.minimum(band, rows - index * band)
    return index * band + lax.rem(local, height), lax.div(local, height)


def give_registers(count: int, action: Literal["increase", "decrease"], compute_wgs: int) -> None:
    """Moves registers from the loading warpgroup to two compute warpgroups; one has enough."""
    if compute_wgs == 2:
        plgpu.set_max_registers(count, action=action)


def largest_first(sizes_G: Array) -> Array:
    """Groups by size, largest first; equal ones in their order.

    By comparison, not by sort: two small kernels in XLA.
    """
    index_G = jnp.arange(sizes_G.shape[0], dtype=jnp.int32)
    larger_GG = sizes_G > sizes_G[:, None]
    earlier_GG = (sizes_G == sizes_G[:, None]) & (index_G < index_G[:, None])
    rank_G = jnp.sum(larger_GG | earlier_GG, axis=1)
    return jnp.sum(jnp.where(rank_G == index_G[:, None], index_G, 0), axis=1).astype(jnp.int32)


class Turns:
    """Numbers 0, 1, ... dealt to the blocks in turn: nothing to allocate or to wait for."""

    @staticmethod
    def scratch(num_warpgroups: int) -> list[Any]:
        """What a kernel allocates."""
        del num_warpgroups
        return []

    def __init__(self, num_ctas: int):
        self.num_ctas = num_ctas

    def draw(self) -> Array:
        """Nothing to ask for."""
        return jnp.int32(0)

    def hand_out(self, index: Array, number: Array) -> None:
        """Nothing to hand out."""
        del index, number

    def read(self, index: Array) -> Array:
        """The block's index-th number."""
        return lax.axis_index("sm") + index * self.num_ctas


class Tickets:
    """Numbers 0, 1, ... dealt to the blocks as they ask, from a counter in device memory.

    A block that meets slow tiles takes fewer. One warpgroup draws numbers and hands them out to
    the block; each warpgroup, that one included, reads every one of them once.
    """

    SLOTS = 2

    @staticmethod
    def scratch(num_warpgroups: int) -> list[Any]:
        """What a kernel allocates: numbers, and barriers for "handed out" and "read by all"."""
        return [
            plgpu.SMEM((Tickets.SLOTS,), jnp.int32),
            plgpu.Barrier(num_arrivals=1, num_barriers=Tickets.SLOTS),
            plgpu.Barrier(num_arrivals=num_warpgroups, num_barriers=Tickets.SLOTS),
        ]

    def __init__(self, numbers: Any, handed_out: Any, taken: Any):
        self.counter = pl.get_global(plgpu.SemaphoreType.REGULAR)
        self.numbers, self.handed_out, self.taken = numbers, handed_out, taken

    def draw(self) -> Array:
        """Asks for a number, which one thread will have and for which nothing waits yet."""

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(),),
            return_type=plgpu.ShapeDtypeStruct(
                (), jnp.dtype("int32"), layout=plgpu.Layout.WG_SPLAT
            ),
        )
        def draw(_, counter):  # type: ignore[no-untyped-def]
            i32 = ir.IntegerType.get_signless(32)
            one_thread = mgpu.utils.single_thread_predicate(mgpu.ThreadSubset.WARPGROUP)
            number = llvm.inline_asm(
                i32,
                [mgpu.utils.memref_ptr(counter), arith.extui(i32, one_thread)],
                "{.reg .pred p; setp.ne.u32 p, $2, 0; mov.u32 $0, 0;"
                " @p atom.relaxed.gpu.global.add.u32 $0, [$1], 1;}",
                "=&r,l,r",
                has_side_effects=True,
            )
            return mgpu.FragmentedArray.splat(number, (), is_signed=True)

        return draw(self.counter)

    def hand_out(self, index: Array, number: Array) -> None:
        """Makes a drawn number the block's index-th."""
        slot = lax.rem(index, jnp.int32(self.SLOTS))
        pl.when(index >= self.SLOTS)(lambda: plgpu.barrier_wait(self.taken.at[slot]))

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
        def store(_, ticket, number):  # type: ignore[no-untyped-def]
            with mgpu.single_thread(scope=mgpu.ThreadSubset.WARPGROUP):
                zeros = [mgpu.utils.c(0, ir.IndexType.get())] * ir.MemRefType(ticket.type).rank
                memref.store(number.registers.item(), ticket, zeros)

        store(self.numbers.at[pl.ds(slot, 1)], number)
        plgpu.barrier_arrive(self.handed_out.at[slot])

    def read(self, index: Array) -> Array:
        """The block's index-th number."""
        slot = lax.rem(index, jnp.int32(self.SLOTS))
        plgpu.barrier_wait(self.handed_out.at[slot])
        number = self.numbers[slot]
        plgpu.barrier_arrive(self.taken.at[slot])
        return number


def for_tiles(
    numbers: Turns | Tickets,
    total: Array | int,
    locate: Callable[[Array], tuple[Array, ...]],
    body: Callable[..., tuple],
    *carry: Any,
) -> tuple:
    """Runs body(index, place, *carry) for each of the block's tiles.

    Args:
        numbers: where the tiles' numbers come from.
        total: number of all tiles.
        locate: the place of a tile from its number, the number first.
        body: returns the next tile's place, which it finds while it has other things to wait for,
            and the next carry.
        carry: what the first tile starts from.

    Returns:
        The last carry.
    """

    def tile(state: tuple) -> tuple:
        index, place, *carry = state
        return (index + 1, *body(index, place, *carry))

    first = (jnp.int32(0), locate(numbers.read(jnp.int32(0))), *carry)
    return lax.while_loop(lambda state: state[1][0] < total, tile, first)[2:]


def load_tiles(
    numbers: Turns | Tickets,
    total: Array | int,
    locate: Callable[[Array], tuple[Array, ...]],
    load: Callable[[tuple[Array, ...], Array], Array],
) -> None:
    """Loads each of the block's tiles, and hands their numbers out to its other warpgroups.

    Numbers are drawn two tiles ahead, so that no load waits for one.

    Args:
        numbers: where the tiles' numbers come from.
        total: number of all tiles.
        locate: the place of a tile from its number, the number first.
        load: loads a tile from its place and the steps before it, and returns those after it.
    """

    def load_tile(
        index: Array, place: tuple[Array, ...], step: Array, number: Array
    ) -> tuple[tuple[Array, ...], Array, Array]:
        numbers.hand_out(index + 1, number)
        number = numbers.draw()
        step = load(place, step)
        return locate(numbers.read(index + 1)), step, number

    numbers.hand_out(jnp.int32(0), numbers.draw())
    for_tiles(numbers, total, locate, load_tile, jnp.int32(0), numbers.draw())
