"""A model put into 4 bits by what its weights multiply on a text: layer by layer, on the device.

The text runs through the layers in the form in which they are stored, so that each layer's search
sees, and mends, what those before it lost. One layer without its experts, one expert, the text's
residual stream and the second moments of one matrix's inputs are in memory at a time. After each
layer the stream goes to the disk, where an interrupted calibration goes on.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path as FilePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsjax.config import QuantisationConfig, RuntimeConfig
from dsjax.families.tensors import Path
from dsjax.files import draft_of
from dsjax.kernels import Kernels
from dsjax.layers.linear import Linear
from dsjax.layers.mlp import MLP
from dsjax.layers.moe import MoE
from dsjax.layers.moe.packed import MATRICES
from dsjax.layers.norm import RMSNorm
from dsjax.layers.options import LayerOptions
from dsjax.mesh import ShardingRules
from dsjax.model import Block
from dsjax.progress import JobProgress
from dsjax.quantise import Sides
from dsjax.quantise.search import Inputs, inputs_of, is_searched, search
from dsjax.weights.calibration_text import CalibrationText
from dsjax.weights.host_experts import is_routed
from dsjax.weights.quantised import quantise_part
from dsjax.weights.sources import WeightSource
from dsjax.weights.stored_params import stored_params
from pallas_kernels.quantised import Format, QuantisedWeights

_MOST_SCORES = 1 << 26  # of attention at once, float32
_STREAM = "calibration.npz"  # in the work folder: the stream before the next layer, and which it is

WriteLeaf = Callable[[Path, tuple[int, ...], np.ndarray], None]


class _Moments(nnx.Variable):
    """Sums over rows that a matrix multiplied."""


class _Watched(nnx.Module):
    """A matrix that remembers the second moments of what it multiplies."""

    def __init__(self, linear: Linear):
        self.linear = linear
        self.moments = _Moments(jnp.zeros((linear.sides.width_in,) * 2, jnp.float32))

    def __call__(self, subscripts: str, x: jax.Array) -> jax.Array:
        rows = x.reshape(-1, self.moments[...].shape[0])
        self.moments[...] += _second_moments(rows)
        return self.linear(subscripts, x)


@jax.jit
def _second_moments(rows_MK: jax.Array) -> jax.Array:
    rows_MK = rows_MK.astype(jnp.float32)
    return jnp.einsum("MK,ML->KL", rows_MK, rows_MK, precision=jax.lax.Precision.HIGHEST)


@nnx.jit
def _attend(block: Block, x_BTD: jax.Array) -> jax.Array:
    positions_BT = jnp.broadcast_to(jnp.arange(x_BTD.shape[1]), x_BTD.shape[:2])
    return block.attention(block.attention_norm(x_BTD), positions_BT, None)


@nnx.jit
def _norm(norm: RMSNorm, x_BTD: jax.Array) -> jax.Array:
    return norm(x_BTD)


@nnx.jit
def _mlp(mlp: MLP, x_BTD: jax.Array) -> jax.Array:
    return mlp(x_BTD)


@nnx.jit
def _route(moe: MoE, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
    routing, _ = moe.router(x_BTD, None, None)
    return routing.gates_BTK, routing.indices_BTK


@jax.jit
def _hidden(x_MD: jax.Array, gate_DF: jax.Array, up_DF: jax.Array) -> jax.Array:
    return jax.nn.silu(x_MD @ gate_DF) * (x_MD @ up_DF)


class Calibration:
    """Searches the numbers of a model's matrices of 4 bits, and hands them on.

    Attributes:
        searched: the matrices that it writes, by path without "weight".
    """

    def __init__(
        self,
        source: WeightSource,
        recipe: QuantisationConfig,
        text: CalibrationText,
        write: WriteLeaf,
    ):
        """Prepares the search.

        Args:
            source: weights that are not quantised yet.
            recipe: how to store them.
            text: what the model reads meanwhile.
            write: is given each leaf of each matrix: its path, its place in the stack, its values.
        """
        self._source, self._text, self._write = source, text, write
        params = stored_params(source.config, recipe)
        self._matrices = params.matrices
        # An embedding's rows are looked up, not multiplied.
        self.searched = frozenset(
            path
            for path, (_, form) in params.matrices.items()
            if is_searched(form) and path != ("embed",)
        )
        runtime = RuntimeConfig(dtype="float32", remat="none")
        self._options = LayerOptions.of(source.config, runtime, ShardingRules(), Kernels())
        self._shapes = {
            path: shape for path, (shape, _) in stored_params(source.config, None).leaves.items()
        }
        self._advance: Callable[[int], None] = lambda _: None

    def run(self, work: FilePath, progress: bool) -> None:
        """Goes through the layers.

        Args:
            work: where an interrupted run left the stream, and where this one will.
            progress: whether to show how far it is.
        """
        config = self._source.config
        first, stream_BTD = self._begin(work / _STREAM)
        sizes = [self._layer_bytes(layer) for layer in range(config.num_layers)]
        with JobProgress(
            "calibrating", sum(sizes), sum(sizes[:first]), unit="bytes", shown=progress
        ) as shown:
            self._advance = shown.advance
            for layer in range(first, config.num_layers):
                self._run_layer(layer, stream_BTD)
                with draft_of(work / _STREAM) as draft, draft.open("wb") as file:
                    np.savez(file, layer=layer + 1, stream=stream_BTD)
        if ("lm_head",) in self.searched:
            norm = RMSNorm(config.hidden_dim, self._options)
            norm.weight = nnx.Param(jnp.asarray(self._read(("norm", "weight"), ())))
            rows = (_norm(norm, jnp.asarray(row)) for row in stream_BTD)
            moments = sum(map(_second_moments, rows), jnp.zeros((config.hidden_dim,) * 2))
            self._matrix(
                ("lm_head",), (), self._read(("lm_head", "weight"), ()), inputs_of(moments)
            )

    def _begin(self, file: FilePath) -> tuple[int, np.ndarray]:
        """Returns the next layer and the stream before it, float32."""
        if file.exists():
            with np.load(file) as kept:
                return int(kept["layer"]), kept["stream"]
        tokens_BT = self._text.tokens_BT
        rows = self._read(("embed", "weight"), ())[tokens_BT.reshape(-1)]
        if ("embed",) in self._matrices:  # each row has its scales
            sides, form = self._matrices["embed",]
            stored = jax.tree.map(jnp.asarray, sides.quantised(rows, form))
            matrix = sides.as_matrix(form, stored.values, stored.scales, stored.zeros)
            rows = np.asarray(matrix.dequantised(jnp.float32)[:, 0])
        return 0, rows.astype(np.float32).reshape(*tokens_BT.shape, -1)

    def _run_layer(self, layer: int, stream_BTD: np.ndarray) -> None:
        """Searches a layer's numbers, and takes the stream through it, in place."""
        stack, index = self._place_of(layer)
        block = self._read_block(stack, index)

        def attend(x_BTD: np.ndarray) -> np.ndarray:
            return np.asarray(_attend(block, jnp.asarray(x_BTD)))

        self._search_in_order((stack, "attention"), index, block.attention, attend, stream_BTD)
        for x_BTD in self._few_rows(stream_BTD):
            x_BTD += attend(x_BTD)
        normed_BTD = np.empty_like(stream_BTD)
        for x_BTD, out_BTD in zip(*map(self._few_rows, (stream_BTD, normed_BTD)), strict=True):
            out_BTD[:] = _norm(block.feed_forward_norm, jnp.asarray(x_BTD))
        path, feed_forward = (stack, "feed_forward"), block.feed_forward
        if isinstance(feed_forward, MLP):
            self._run_mlp(path, index, feed_forward, normed_BTD, stream_BTD)
            return
        self._run_experts(path, index, feed_forward, normed_BTD, stream_BTD)
        if feed_forward.shared is not None:
            self._run_mlp((*path, "shared"), index, feed_forward.shared, normed_BTD, stream_BTD)

    def _run_mlp(
        self, path: Path, index: int, mlp: MLP, normed_BTD: np.ndarray, stream_BTD: np.ndarray
    ) -> None:
        def run(x_BTD: np.ndarray) -> np.ndarray:
            return np.asarray(_mlp(mlp, jnp.asarray(x_BTD)))

        self._search_in_order(path, index, mlp, run, normed_BTD)
        for x_BTD, out_BTD in zip(*map(self._few_rows, (normed_BTD, stream_BTD)), strict=True):
            out_BTD += run(x_BTD)

    def _search_in_order(
        self,
        path: Path,
        index: int,
        module: nnx.Module,
        run: Callable[[np.ndarray], np.ndarray],
        inputs_BTD: np.ndarray,
    ) -> None:
        """Searches a module's matrices, each after those whose results it multiplies."""
        matrices = [(name, m) for name, m in vars(module).items() if isinstance(m, Linear)]
        for name, linear in matrices:  # in the order in which they were made
            if (*path, name) not in self.searched:
                continue
            watched = _Watched(linear)
            setattr(module, name, watched)
            for x_BTD in self._few_rows(inputs_BTD):
                run(x_BTD)
            setattr(module, name, linear)
            inputs = inputs_of(watched.moments[...])
            weight = np.asarray(linear.weight[...])
            linear.weight[...] = self._matrix((*path, name), (index,), weight, inputs)

    def _run_experts(
        self, path: Path, index: int, moe: MoE, normed_BTD: np.ndarray, stream_BTD: np.ndarray
    ) -> None:
        """Searches experts one at a time, each by the tokens that come to it and their gates."""
        normed_ND = normed_BTD.reshape(-1, normed_BTD.shape[-1])
        stream_ND = stream_BTD.reshape(normed_ND.shape)
        router = (*path, "router", "gate")
        if router in self.searched:
            weight = moe.router.gate.weight
            inputs = inputs_of(self._sum_of_moments(normed_BTD))
            weight[...] = self._matrix(router, (index,), np.asarray(weight[...]), inputs)
        routed = [_route(moe, jnp.asarray(x_BTD)) for x_BTD in self._few_rows(normed_BTD)]
        gates_NK, experts_NK = (
            np.concatenate([np.asarray(part).reshape(-1, part.shape[-1]) for part in parts])
            for parts in zip(*routed, strict=True)
        )
        for expert in range(moe.config.num_experts):
            tokens_M, places_M = np.nonzero(experts_NK == expert)
            x_MD, gates_M1 = _padded(normed_ND[tokens_M]), gates_NK[tokens_M, places_M][:, None]
            gates = _padded(gates_M1)
            place = (index, expert)
            gate, up, down = (
                self._read((*path, name, "weight"), place).astype(np.float32) for name in MATRICES
            )
            # What an expert gives counts as much as its gate.
            searched = {name for name in MATRICES if (*path, name) in self.searched}
            into = inputs_of(_second_moments(x_MD * gates)) if searched - {"w_down"} else None
            gate_DF = self._matrix((*path, "w_gate"), place, gate, into)
            up_DF = self._matrix((*path, "w_up"), place, up, into)
            hidden_MF = _hidden(x_MD, gate_DF, up_DF)
            out = inputs_of(_second_moments(hidden_MF * gates)) if "w_down" in searched else None
            down_FD = self._matrix((*path, "w_down"), place, down, out)
            out_MD = np.asarray(gates * (hidden_MF @ down_FD))[: tokens_M.size]
            stream_ND[tokens_M] += out_MD  # a token comes to an expert once

    def _matrix(
        self, path: Path, place: tuple[int, ...], weight: np.ndarray, inputs: Inputs | None
    ) -> jax.Array:
        """Returns one matrix as it will be stored, float32, and hands on what was searched."""
        if path not in self._matrices:
            return jnp.asarray(weight, jnp.float32)
        sides, form = self._matrices[path]
        single = sides.single
        if path not in self.searched:
            return _widened(single, form, quantise_part(weight, (), single, form))
        assert inputs is not None
        leaves = quantise_part(weight, (), single, form, search(inputs))
        for name, leaf in leaves.items():
            self._write((*path, name), place, leaf)
        return _widened(single, form, leaves)

    def _few_rows(self, array_BTD: np.ndarray) -> Iterator[np.ndarray]:
        """Yields rows of texts, as views, as many as attention is given at once."""
        scores = self._source.config.attention.num_heads * array_BTD.shape[1] ** 2
        step = max(1, _MOST_SCORES // scores)
        for first in range(0, len(array_BTD), step):
            yield array_BTD[first : first + step]

    def _sum_of_moments(self, rows_BTD: np.ndarray) -> jax.Array:
        width = rows_BTD.shape[-1]
        total = jnp.zeros((width, width), jnp.float32)
        for x_BTD in self._few_rows(rows_BTD):
            total += _second_moments(jnp.asarray(x_BTD).reshape(-1, width))
        return total

    def _read_block(self, stack: str, index: int) -> Block:
        """Returns a layer without its routed experts, in the form in which it will be stored.

        Matrices that are searched are still as they were.
        """
        config = self._source.config
        sparse = stack == "moe_layers"
        shapes = nnx.eval_shape(lambda: Block(config, sparse, self._options, nnx.Rngs(0)))
        graphdef, state = nnx.split(shapes)
        leaves = []
        for key, variable in nnx.to_flat_state(state):
            path = (stack, *map(str, key))
            array: Any
            if is_routed(path):
                array = np.zeros((0, *variable.shape[1:]), np.float32)
            else:
                array = self._read(path, (index,)).astype(np.float32)
                if path[:-1] not in self.searched and path[-1] == "weight":
                    array = self._matrix(path[:-1], (index,), array, None)
            leaves.append((key, variable.replace(jnp.asarray(array))))
        return nnx.merge(graphdef, nnx.from_flat_state(leaves))

    def _read(self, path: Path, place: tuple[int, ...]) -> np.ndarray:
        """Reads a parameter, or of a stack the one at a place."""
        shape = self._shapes[path]
        window = tuple(slice(i, i + 1) for i in place)
        window += tuple(slice(0, size) for size in shape[len(place) :])
        array = self._source.read(path, window)
        if path[0] in ("dense_layers", "moe_layers"):
            self._advance(array.nbytes)
        return array[(0,) * len(place)]

    def _layer_bytes(self, layer: int) -> int:
        stack, _ = self._place_of(layer)
        return sum(
            math.prod(shape[1:]) * self._source.dtype(path).itemsize
            for path, shape in self._shapes.items()
            if path[0] == stack
        )

    def _place_of(self, layer: int) -> tuple[str, int]:
        """Returns a layer's stack, and its place there."""
        dense = self._source.config.num_dense_layers
        return ("dense_layers", layer) if layer < dense else ("moe_layers", layer - dense)


@functools.partial(jax.jit, static_argnames="sides")
def _whole(sides: Sides, matrix: QuantisedWeights) -> jax.Array:
    return sides.whole(matrix.dequantised(jnp.float32))


def _widened(sides: Sides, form: Format, leaves: dict[str, np.ndarray]) -> jax.Array:
    """The numbers that a stored matrix stands for, float32."""
    matrix = sides.as_matrix(form, leaves["weight"], leaves["scales"], leaves.get("zeros"))
    return _whole(sides, matrix)


def _padded(rows: np.ndarray) -> jax.Array:
    """Adds rows of zeros up to a power of two: few programs, and none of their sums changes."""
    size = 1 << max(len(rows) - 1, 127).bit_length()
    return jnp.asarray(np.pad(rows, ((0, size - len(rows)), (0, 0))))
