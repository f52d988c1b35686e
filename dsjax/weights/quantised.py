"""Weights stored in fewer bits: what a recipe makes of a model's parameters, and how on the way.

A matrix is quantised from its whole contracted width, on the host and piece by piece, so that
neither host nor device holds it as it was. Loading and conversion come to the same numbers.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import numpy as np

from dsjax.config import ModelConfig, QuantisationConfig
from dsjax.families.tensors import HFTable, Path
from dsjax.quantise import Sides
from dsjax.weights.assets import Assets
from dsjax.weights.sources import WeightSource
from dsjax.weights.stored_params import StoredParams, stored_params
from pallas_kernels.quantised import Format, QuantisedWeights, quantise

_WORKERS = 4
_PIECE_WEIGHTS = 16 << 20  # of a matrix that are quantised at once, at some 20 bytes each


class QuantisingSource:
    """A source whose matrices are quantised while they are read.

    Attributes:
        params: what becomes of them.
    """

    def __init__(self, source: WeightSource, recipe: QuantisationConfig):
        """Wraps a source of weights that are not quantised yet.

        Raises:
            ValueError: they are, or the recipe does not fit the model.
        """
        require_not_quantised(source)
        self.where: FilePath = source.where
        self.config: ModelConfig = source.config
        self.table: HFTable = source.table
        self.assets: Assets = source.assets
        self.recipe: QuantisationConfig | None = recipe
        self.params = stored_params(source.config, recipe)
        self._source = source
        # Scales and zeros of the pieces whose numbers were read; they are read after them.
        self._small: dict[tuple[Path, tuple[int, ...]], QuantisedWeights] = {}
        self._lock = threading.Lock()

    def dtype(self, path: Path) -> np.dtype:
        """Returns the type that a parameter is read in."""
        _, dtype = self.params.leaves[path]
        return self._source.dtype(path) if dtype is None else dtype

    def read(self, path: Path, window: tuple[slice, ...]) -> np.ndarray:
        """Reads a window of a parameter, of its numbers, scales or zeros where it is quantised."""
        matrix, leaf = path[:-1], path[-1]
        if matrix not in self.params.matrices:
            return self._source.read(path, window)
        _, dtype = self.params.leaves[path]
        out = np.empty([w.stop - w.start for w in window], dtype)
        with ThreadPoolExecutor(_WORKERS) as pool:
            pieces = list(_pieces(self.params, matrix, path, window))
            for _ in pool.map(lambda piece: self._fill(out, matrix, leaf, window, piece), pieces):
                pass
        return out

    def close(self) -> None:
        """Closes the files that reading opened."""
        self._source.close()

    def _fill(
        self, out: np.ndarray, matrix: Path, leaf: str, window: tuple[slice, ...], piece: _Piece
    ) -> None:
        """Writes to `out` what a window of a leaf has of a piece of the matrix."""
        key = (matrix, piece.place)
        with self._lock:
            parts = None if leaf == "weight" else self._small.pop(key, None)
        if parts is None:
            sides, form = self.params.matrices[matrix]
            raw = self._source.read((*matrix, "weight"), piece.raw)
            parts = sides.quantised(raw, form)
            if leaf == "weight":
                small = QuantisedWeights(None, parts.scales, parts.zeros, form)
                with self._lock:
                    self._small[key] = small
        values = parts.values if leaf == "weight" else getattr(parts, leaf)
        take, put = [], []
        for dim, asked in enumerate(window):
            first = piece.first_of_leaf(leaf, dim)
            start = max(asked.start, first)
            stop = min(asked.stop, first + values.shape[dim])
            take.append(slice(start - first, stop - first))
            put.append(slice(start - asked.start, stop - asked.start))
        out[tuple(put)] = values[tuple(take)]


@dataclass(frozen=True)
class _Piece:
    """A part of a matrix that is quantised at once: all that is contracted, and some columns.

    Attributes:
        place: index of each stacked dim, and of the piece along the first dim of the result.
        raw: the window of the matrix as it was.
        column: first place along the first dim of the result.
        block_out: columns that share a scale.
    """

    place: tuple[int, ...]
    raw: tuple[slice, ...]
    column: int
    block_out: int

    def first_of_leaf(self, leaf: str, dim: int) -> int:
        """The first place that it has along a dim of what is stored."""
        stacked = len(self.place) - 1
        if dim < stacked:
            return self.place[dim]
        if dim > stacked:
            return 0
        return self.column if leaf == "weight" else self.column // self.block_out


def _pieces(
    params: StoredParams, matrix: Path, path: Path, window: tuple[slice, ...]
) -> Iterator[_Piece]:
    """Yields the pieces of a matrix that a window of what is stored of it touches.

    They lie on a grid that does not depend on the window.
    """
    sides, form = params.matrices[matrix]
    shape, _ = params.leaves[(*matrix, "weight")]
    extra = len(shape) - len(sides.shape)
    stacked = extra + sides.num_stacked
    ins = sides.shape[sides.num_stacked :][: sides.num_contracted]
    outs = sides.shape[sides.num_stacked + sides.num_contracted :]
    everything = tuple(slice(0, size) for size in ins)
    if not outs:  # a stack of rows: pieces of many
        step = max(1, _PIECE_WEIGHTS // math.prod(ins))
        total = shape[stacked - 1]
        rows = window[stacked - 1]
        for number in range(rows.start // step, -(-rows.stop // step)):
            span = slice(number * step, min((number + 1) * step, total))
            yield _Piece((span.start, 0), (span, *everything), 0, form.block_out)
        return
    step = _PIECE_WEIGHTS // math.prod((*ins, *outs[1:]))
    step = max(step // form.block_out, 1) * form.block_out
    asked = window[stacked]
    unit = 1 if path[-1] == "weight" else form.block_out
    first, last = asked.start * unit, min(asked.stop * unit, outs[0])
    for place in itertools.product(*(range(w.start, w.stop) for w in window[:stacked])):
        index = tuple(slice(i, i + 1) for i in place)
        for number in range(first // step, -(-last // step)):
            span = slice(number * step, min((number + 1) * step, outs[0]))
            others = tuple(slice(0, size) for size in outs[1:])
            raw = (*index, *everything, span, *others)
            yield _Piece((*place, number), raw, span.start, form.block_out)


def quantise_part(
    values: np.ndarray,
    index: tuple[int, ...],
    sides: Sides,
    form: Format,
    rounding: Callable[[Any, Format], QuantisedWeights] = quantise,
) -> dict[str, np.ndarray]:
    """Quantises one matrix of a stack, a piece at a time.

    Args:
        values: the matrix, in its parameter's order of dims.
        index: its place in the stack, of layers and experts.
        sides: dims of the stack's matrices.
        form: how to store it.
        rounding: chooses the numbers.

    Returns:
        Its numbers, scales and zeros, by the names of the parameters that hold them.
    """
    lead = len(index)
    values = values.reshape((1,) * lead + values.shape)
    # Pieces along the first dim of the result, or of the rows of an embedding.
    extra = values.ndim - len(sides.shape)
    axis = extra + sides.num_stacked + sides.num_contracted
    axis = axis if axis < values.ndim else axis - sides.num_contracted - 1
    size = values.shape[axis]
    step = max(_PIECE_WEIGHTS * size // values.size // form.block_out, 1) * form.block_out
    pieces = [
        sides.quantised(
            values[(slice(None),) * axis + (slice(start, start + step),)], form, rounding
        )
        for start in range(0, size, step)
    ]

    def joined(name: str) -> np.ndarray:
        leaves = [getattr(piece, name) for piece in pieces]
        whole = leaves[0] if len(leaves) == 1 else np.concatenate(leaves, axis=lead)
        return np.ascontiguousarray(whole[(0,) * lead])

    names = {"weight": "values", "scales": "scales"} | (
        {"zeros": "zeros"} if form.zero_points else {}
    )
    return {leaf: joined(name) for leaf, name in names.items()}


def require_not_quantised(source: WeightSource) -> None:
    """Raises ValueError where a source's weights are quantised already."""
    if source.recipe is not None:
        raise ValueError(f"{source.where}: is quantised already; quantise the model it came from")
