"""Reading a row with a model whose routed experts are in the host's memory.

The loop over the layers is the host's, as it must know which experts a layer wants before it can
bring them. A layer is two programs, each compiled once for all layers:

    attend     adds the experts of the layer before; attention, router and shared experts of this
               one; and which experts the next layer's router would choose for this layer's input
    experts    the products of the experts wanted, each of which comes as an array of its own bytes

Between the two the host waits for the choice (a few integers), begins to copy the experts that the
device does not keep, then what is foreseen for the next layer, and launches the products behind
the former: the link is busy while the device computes, and never with a guess while something is
known to be wanted. What the device keeps is a table of arrays on the host
(`ExpertCache`), so an expert that comes or goes costs no launch and moves nothing else. The price
is that the products' program lays a layer's few experts side by side first, a copy within the
device that is some ten times as fast as any link.

A row that wants many experts, as a prompt does, takes them in waves of bounded number. The next
wave is copied while one is multiplied, and what prompts bring does not drive out what decoding uses
again and again. Results are those of a model that has its experts, to rounding where the products
of another number of experts add up in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsjax.cache import LatentPool
from dsjax.engine import programs
from dsjax.engine.compiled import are_quantised, compiled
from dsjax.engine.expert_cache import ExpertCache
from dsjax.engine.programs import ModelKey, RowShape
from dsjax.engine.sizes import wave_sizes
from dsjax.inference.sampler import LogProbs
from dsjax.kernels import Kernels
from dsjax.layers.moe import MoE
from dsjax.layers.moe.experts import apply_experts_to_rows
from dsjax.layers.moe.packed import ExpertLayout
from dsjax.model import Block
from dsjax.weights.host_experts import HostExperts

_AHEAD = 2  # waves that may be under way while the host prepares another


class Tables(NamedTuple):
    """What describes a row on the device: see `programs.read_row`."""

    newest_S: Any
    table_SP: Any
    integers_RK: Any


class Attended(NamedTuple):
    """A layer before its routed experts.

    Attributes:
        x_BTD: residual stream after attention.
        normed_BTD: what the experts take.
        out_BTD: what the feed-forward gives so far: the shared experts.
        gates_BTK: float32.
        indices_BTK: int32 experts; their number for none.
        choices_2BTK: int32, for the host: the experts again, and those that the next layer's router
            chooses for this layer's input.
    """

    x_BTD: jax.Array
    normed_BTD: jax.Array
    out_BTD: jax.Array
    gates_BTK: jax.Array
    indices_BTK: jax.Array
    choices_2BTK: jax.Array


class HostReader:
    """Reads rows, layer by layer."""

    def __init__(
        self,
        key: ModelKey,
        leaves: tuple[jax.Array, ...],
        experts: HostExperts,
        capacity: int,
        sharding: jax.sharding.Sharding,
        *,
        guesses: int | None = None,
    ) -> None:
        """Copies nothing yet.

        Args:
            key: the model without its arrays.
            leaves: its arrays.
            experts: its routed experts.
            capacity: experts that the device keeps.
            sharding: of all arrays on the device.
            guesses: experts of a layer that are copied at most on the word of the router before;
                None for a wave.
        """
        self._key, self._leaves, self._experts = key, leaves, experts
        self._sharding = sharding
        self._model = key.model(leaves)
        self._sizes = wave_sizes(self._model.config)
        self.guesses = self._sizes[-1] if guesses is None else guesses
        self._cache: ExpertCache[tuple[int, int], jax.Array] = ExpertCache(
            capacity, self._bring, experts.layout.num_bytes, experts.traffic
        )
        self._programs: dict[Hashable, Any] = {}
        self._numbers: list[jax.Array] = []

    def _bring(self, places: Sequence[tuple[int, int]]) -> list[jax.Array]:
        packed = [self._experts.packed[layer][expert] for layer, expert in places]
        return jax.device_put(packed, self._sharding)

    def _number(self, value: int) -> jax.Array:
        """Returns an int32 on the device. None is copied there twice: it would wait for experts."""
        for one in range(len(self._numbers), value + 1):
            self._numbers.append(jax.device_put(np.int32(one), self._sharding))
        return self._numbers[value]

    def forget(self) -> None:
        """Frees what the device keeps."""
        self._cache.clear()

    def read(
        self, shape: RowShape, pool: LatentPool, tables: Tables, known_W: jax.Array
    ) -> tuple[jax.Array, LogProbs | None, LatentPool]:
        """Does what `programs.read_row` does; returns while the last layer is still computed."""
        arguments: tuple[Any, ...] = (self._leaves, pool, *tables)
        x_BTD, out_BTD, pool = self._run(begin_row, shape, arguments, (1,))
        num_layers = len(self._experts.packed)
        self._number(max(num_layers, self._experts.layout.num_experts) - 1)
        for layer in range(num_layers):
            arguments = (self._leaves, pool, *tables, x_BTD, out_BTD, self._number(layer))
            attended, pool = self._run(attend, shape, arguments, (1,))
            attended.choices_2BTK.copy_to_host_async()
            out_BTD = self._experts_of(layer, attended, passing=shape.chunk is not None)
            x_BTD = attended.x_BTD
        logits_MW, logprobs = self._run(
            end_row, shape, (self._leaves, *tables, x_BTD, out_BTD, known_W)
        )
        return logits_MW, logprobs, pool

    def _experts_of(self, layer: int, attended: Attended, *, passing: bool) -> jax.Array:
        """Adds a layer's routed experts to its shared ones."""
        indices_BTK, foreseen_BTK = np.asarray(attended.choices_2BTK)
        places = self._places(layer, indices_BTK)
        most = self._sizes[-1]
        sums = [attended.out_BTD]
        for first in range(0, len(places), most):
            wave = places[first : first + most]
            if len(sums) > _AHEAD:  # so that a layer's experts are not all on the device
                sums[-_AHEAD].block_until_ready()
            packed = self._cache.take(wave, passing=passing)
            size = next(size for size in self._sizes if size >= len(wave))
            packed += [packed[0]] * (size - len(wave))
            if first + most >= len(places) and not passing:
                # Before the products are launched: memory that a copy goes to is free when all that
                # was launched before is done.
                self._foresee_for(layer + 1, foreseen_BTK)
            added = attended._replace(out_BTD=sums[-1])
            sums.append(self._run(run_experts, None, (added, self._number(first), tuple(packed))))
        return sums[-1]

    def _foresee_for(self, layer: int, foreseen_BTK: np.ndarray) -> None:
        if self.guesses and layer < len(self._experts.packed):
            by_rank = np.moveaxis(foreseen_BTK, -1, 0).reshape(-1).tolist()
            places = [(layer, one) for one in dict.fromkeys(by_rank)]
            known = [place for place in places if place[1] < len(self._experts.packed[layer])]
            self._cache.foresee(known[: self._sizes[-1]], self.guesses)

    def _places(self, layer: int, indices_BTK: np.ndarray) -> list[tuple[int, int]]:
        found = np.unique(indices_BTK)
        return [(layer, int(one)) for one in found if one < len(self._experts.packed[layer])]

    # Programs

    def warm_up(self, shapes: list[RowShape], pool: Any, tables: Any, known_W: Any) -> None:
        """Compiles all programs, of shapes alone."""
        config, dtype = self._model.config, self._model.options.dtype
        assert config.moe is not None
        leaves = self._leaves
        for shape in shapes:
            row = tables._replace(integers_RK=self._shape((1, shape.num_integers), jnp.int32))
            size = shape.num_decoding + (0 if shape.chunk is None else shape.chunk.row_tokens)
            x_BTD = self._shape((1, size, config.hidden_dim), dtype)
            self._program(begin_row, shape, (leaves, pool, *row), (1,))
            number = self._shape((), jnp.int32)
            self._program(attend, shape, (leaves, pool, *row, x_BTD, x_BTD, number), (1,))
            self._program(end_row, shape, (leaves, *row, x_BTD, x_BTD, known_W))
            chosen = (1, size, config.moe.top_k)
            gates, indices = self._shape(chosen, jnp.float32), self._shape(chosen, jnp.int32)
            choices = self._shape((2, *chosen), jnp.int32)
            attended = Attended(x_BTD, x_BTD, x_BTD, gates, indices, choices)
            packed = self._shape((self._experts.layout.num_bytes,), jnp.uint8)
            for count in self._sizes:
                self._program(run_experts, None, (attended, number, (packed,) * count))

    def _shape(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._sharding)

    def _run(
        self,
        function: Callable[..., Any],
        shape: RowShape | None,
        arguments: tuple[Any, ...],
        donated: tuple[int, ...] = (),
    ) -> Any:
        return self._program(function, shape, arguments, donated)(*arguments)

    def _program(
        self,
        function: Callable[..., Any],
        shape: RowShape | None,
        arguments: tuple[Any, ...],
        donated: tuple[int, ...] = (),
    ) -> Any:
        """Returns a program for a row's shape; that of the experts, for their arrays' sizes."""
        key: Hashable = (function, shape)
        static: tuple[Hashable, ...] = (self._key, shape)
        if shape is None:
            key = (function, arguments[0].x_BTD.shape, len(arguments[2]))
            static = (self._experts.layout, self._model.options.kernels)
        if key not in self._programs:
            quantised = shape is None or are_quantised(self._leaves)  # experts come as bytes
            self._programs[key] = compiled(
                function, static, arguments, donated, self._sharding, quantised=quantised
            )
        return self._programs[key]


def begin_row(
    key: ModelKey,
    shape: RowShape,
    leaves: tuple[jax.Array, ...],
    pool: LatentPool,
    newest_S: jax.Array,
    table_SP: jax.Array,
    integers_RK: jax.Array,
) -> tuple[jax.Array, jax.Array, LatentPool]:
    """Embeds a row and runs the layers without experts; returns x_BTD, zeros like it, the pool."""
    model = key.model(leaves)
    row = programs.rows_of(shape, newest_S, table_SP, integers_RK)

    def run(carry: Any, xs: tuple[Block, jax.Array]) -> tuple[Any, None]:
        block, layer = xs
        return block.extend(carry[0], carry[1], row.view, layer, None), None

    with jax.named_scope("embed"):
        carry = model.embed.rows(row.tokens_RT), pool
    for stack in model.stacks():
        if stack.layers is model.dense_layers:
            numbers = stack.first + jnp.arange(stack.num_layers, dtype=jnp.int32)
            carry, _ = jax.lax.scan(run, carry, (stack.layers, numbers))
    x_BTD, pool = carry
    return x_BTD, jnp.zeros_like(x_BTD), pool


def attend(
    key: ModelKey,
    shape: RowShape,
    leaves: tuple[jax.Array, ...],
    pool: LatentPool,
    newest_S: jax.Array,
    table_SP: jax.Array,
    integers_RK: jax.Array,
    x_BTD: jax.Array,
    out_BTD: jax.Array,
    layer: jax.Array,
) -> tuple[Attended, LatentPool]:
    """Runs a layer up to its routed experts.

    Args:
        key: the model without its arrays.
        shape: of the row.
        leaves: the model's arrays.
        pool: donated.
        newest_S: and the two after it describe the row; see `programs.read_row`.
        table_SP: likewise.
        integers_RK: likewise.
        x_BTD: residual stream without the feed-forward of the layer before.
        out_BTD: what that gave.
        layer: int32 scalar, among the layers with experts.
    """
    model = key.model(leaves)
    view = programs.rows_of(shape, newest_S, table_SP, integers_RK).view
    assert model.moe_layers is not None
    graphdef, state = nnx.split(model.moe_layers)
    last = model.config.num_moe_layers - 1

    def block_of(index: jax.Array) -> Block:
        return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[index], state))

    block, following = block_of(layer), block_of(jnp.minimum(layer + 1, last))
    x_BTD += out_BTD
    with jax.named_scope("attention"):
        normed_BTD = block.attention_norm(x_BTD)
        number = layer + model.config.num_dense_layers
        out_BTD, pool = block.attention.extend(normed_BTD, pool, view, number)
    x_BTD += out_BTD
    normed_BTD = block.feed_forward_norm(x_BTD)
    moe, foreseeing = block.feed_forward, following.feed_forward
    assert isinstance(moe, MoE)
    assert isinstance(foreseeing, MoE)
    mask_BT = view.mask()
    with jax.named_scope("router"):
        routing, _ = moe.router(normed_BTD, mask_BT, None)
        foreseen, _ = foreseeing.router(following.feed_forward_norm(x_BTD), mask_BT, None)
    if moe.shared is None:
        out_BTD = jnp.zeros_like(x_BTD)
    else:
        with jax.named_scope("experts"):
            out_BTD = moe.shared(normed_BTD)
    attended = Attended(
        x_BTD,
        normed_BTD,
        out_BTD,
        routing.gates_BTK,
        routing.indices_BTK,
        jnp.stack([routing.indices_BTK, foreseen.indices_BTK]),
    )
    return attended, pool


def run_experts(
    layout: ExpertLayout,
    kernels: Kernels,
    attended: Attended,
    first: jax.Array,
    packed: tuple[jax.Array, ...],
) -> jax.Array:
    """Adds some experts to what a layer's feed-forward gives so far.

    Args:
        layout: what an expert's bytes mean.
        kernels: that copy rows and multiply them.
        attended: the layer so far.
        first: int32 scalar. Of the experts that the layer wants, in rising order, the first here.
        packed: uint8, the bytes of this expert and those after it; more than there are is no harm.

    Returns:
        out_BTD.
    """
    num_experts = layout.num_experts
    # Which experts these are, the device knows as well: nothing need be copied to say it.
    wanted_E = jnp.zeros(num_experts, jnp.int32).at[attended.indices_BTK].set(1, mode="drop")
    places_E = jnp.cumsum(wanted_E) - 1 - first
    places_BTK = places_E.at[attended.indices_BTK].get(mode="fill", fill_value=-1)
    here_BTK = (places_BTK >= 0) & (places_BTK < len(packed))
    places_BTK = jnp.where(here_BTK, places_BTK, len(packed))
    width, top_k = attended.normed_BTD.shape[-1], places_BTK.shape[-1]
    places_NK = places_BTK.reshape(-1, top_k).astype(jnp.int32)
    with jax.named_scope("experts"):
        routed_ND = apply_experts_to_rows(
            attended.normed_BTD.reshape(-1, width),
            places_NK,
            attended.gates_BTK.reshape(-1, top_k),
            layout.unpack(packed),
            0,
            places_NK.size,
            kernels,
        )
    return routed_ND.reshape(attended.out_BTD.shape) + attended.out_BTD


def end_row(
    key: ModelKey,
    shape: RowShape,
    leaves: tuple[jax.Array, ...],
    newest_S: jax.Array,
    table_SP: jax.Array,
    integers_RK: jax.Array,
    x_BTD: jax.Array,
    out_BTD: jax.Array,
    known_W: jax.Array,
) -> tuple[jax.Array, LogProbs | None]:
    """Returns the logits after the last layer, and log-probabilities of the pieces' tokens."""
    row = programs.rows_of(shape, newest_S, table_SP, integers_RK)
    hidden_TD = (x_BTD + out_BTD)[0]
    return programs.logits_of_rows(key.model(leaves), shape, row, hidden_TD, known_W)
