"""Hugging Face tensors and our parameters: a table of rows, read in both directions.

A row names a tensor, its dims as they lie in the file, and the parameters it becomes, each with
its own order of the same dims. Dims are the letters of `dsjax.layers`; brackets join dims that
the file keeps as one, and a sum such as `N+R` is a dim that holds one part after the other, which
a parameter may take a single part of. So

    Row("self_attn.q_b_proj.weight", "(H N+R) Q",
        "attention.wq_nope.weight: Q H N", "attention.wq_rope.weight: Q H R")

says that the file holds [H * (N + R), Q] and that `wq_nope` is its first N rows of every head,
transposed to [Q, H, N]. Everything else here only executes the table: `HFTable.params` is the way
in, `HFTable.tensors` the way out, and a name that neither knows is an error. The rows themselves
are a family's.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dsjax.families.strided_copy import copy_strided

Path = tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """One line of the table: an HF tensor, its layout, and "parameter: layout" for each part."""

    name: str
    layout: str
    parts: tuple[str, ...]

    def __init__(self, name: str, layout: str, *parts: str):
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "layout", layout)
        object.__setattr__(self, "parts", parts)


@dataclass(frozen=True)
class Part:
    """What one parameter takes from a tensor.

    Attributes:
        path: the parameter.
        index: layer, or layer and expert, within the stacked parameter; () if it is not stacked.
        split: the dim of the tensor's view that it takes a range of, and that range.
        order: of each dim of the parameter's slice, the dim of the view it is.
    """

    path: Path
    index: tuple[int, ...]
    split: tuple[int, slice]
    order: tuple[int, ...]


@dataclass(frozen=True)
class HFTensor:
    """One tensor of the checkpoint.

    Attributes:
        name: as in the file.
        shape: as in the file.
        view: the shape with joined dims apart.
        parts: what becomes of it; together they are the whole tensor.
    """

    name: str
    shape: tuple[int, ...]
    view: tuple[int, ...]
    parts: tuple[Part, ...]

    def part_shape(self, part: Part) -> tuple[int, ...]:
        """Returns the shape of a part, in the parameter's order."""
        shape = list(self.view)
        axis, taken = part.split
        shape[axis] = taken.stop - taken.start
        return tuple(shape[axis] for axis in part.order)

    def read_part(
        self, part: Part, window: tuple[slice, ...], read: Callable[[str, int, int], np.ndarray]
    ) -> np.ndarray:
        """Reads a window of one part, and from the file only the rows it lies in.

        Args:
            part: one of `parts`.
            window: a range (start and stop given) of each dim of the part's shape.
            read: returns elements start to stop of the tensor of that name, flat.
        """
        axis, taken = part.split
        ranges = [slice(0, size) for size in self.view]
        for dim, chosen in zip(part.order, window, strict=True):
            offset = taken.start if dim == axis else 0
            ranges[dim] = slice(chosen.start + offset, chosen.stop + offset)
        rows, stride = ranges[0], math.prod(self.view[1:])
        flat = read(self.name, rows.start * stride, rows.stop * stride)
        array = flat.reshape(rows.stop - rows.start, *self.view[1:])
        return array[(slice(None), *ranges[1:])].transpose(part.order)

    def from_parts(self, read: Callable[[Part], np.ndarray]) -> np.ndarray:
        """Returns the tensor put together from its parts, contiguous.

        Args:
            read: returns a part in its parameter's order of dims.
        """
        first = read(self.parts[0])
        out = np.empty(self.view, first.dtype)
        for part in self.parts:
            axis, taken = part.split
            target = out[(slice(None),) * axis + (taken,)].transpose(part.order)
            copy_strided(target, first if part is self.parts[0] else read(part))
        return out.reshape(self.shape)


@dataclass(frozen=True)
class Param:
    """One parameter of ours: its shape, and the tensor of each index of its stacked dims."""

    shape: tuple[int, ...]
    pieces: Mapping[tuple[int, ...], tuple[HFTensor, Part]]

    @property
    def num_stacked(self) -> int:
        """Leading dims that count layers and experts."""
        return len(next(iter(self.pieces)))

    def read(
        self, window: tuple[slice, ...], read: Callable[[str, int, int], np.ndarray]
    ) -> np.ndarray:
        """Reads a window of the parameter; see `HFTensor.read_part`."""
        stacked, inner = window[: self.num_stacked], window[self.num_stacked :]
        out = None
        for place in itertools.product(*(range(w.start, w.stop) for w in stacked)):
            tensor, part = self.pieces[place]
            piece = tensor.read_part(part, inner, read)
            if out is None:
                shape = tuple(w.stop - w.start for w in window)
                out = np.empty(shape, piece.dtype)
            index = tuple(i - w.start for i, w in zip(place, stacked, strict=True))
            copy_strided(out[index], piece)
        assert out is not None
        return out


@dataclass(frozen=True)
class HFTable:
    """The table of one model.

    Attributes:
        tensors: every tensor of its checkpoint, by name, in the order of the layers.
        params: every parameter, by path.
        ignored: names of tensors that old checkpoints carry and that follow from the config.
    """

    tensors: Mapping[str, HFTensor] = field(repr=False)
    params: Mapping[Path, Param] = field(repr=False)
    ignored: re.Pattern[str]

    @classmethod
    def of(cls, tensors: Mapping[str, HFTensor], ignored: re.Pattern[str]) -> HFTable:
        """Makes a table of tensors that `place` made."""
        return cls(tensors, _collect_params(tensors), ignored)

    def is_ignored(self, name: str) -> bool:
        """Says whether a checkpoint may hold this tensor without the model needing it."""
        return self.ignored.fullmatch(name) is not None

    def check_names(self, names: Mapping[str, str], where: str) -> None:
        """Checks that a checkpoint holds every tensor of the model and no other.

        Args:
            names: the tensors found, and the file of each or ""; those that the table ignores by
                name may be among them.
            where: the checkpoint, for the message.

        Raises:
            ValueError: counts the tensors that are missing and those that are unknown, names five
                of each, and says what such a checkpoint is where the names tell.
        """
        found = {name for name in names if not self.is_ignored(name)}
        missing = [name for name in self.tensors if name not in found]
        unknown = sorted(found - self.tensors.keys())
        faults = []
        if missing:
            faults.append(f"{len(missing)} tensors are missing: {few(missing)}")
        if unknown:
            shown = few([names[name] + f": {name}" if names[name] else name for name in unknown])
            faults.append(f"{len(unknown)} tensors are not of this model: {shown}")
        if faults:
            what = _what_it_is(missing, unknown)
            raise ValueError(f"{where}: {what}{'; '.join(faults)}")


def few(names: Sequence[str]) -> str:
    """Returns five names at most, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _what_it_is(missing: Sequence[str], unknown: Sequence[str]) -> str:
    """Says what checkpoint has such names, where that is known; ends in ": "."""
    if any(
        re.search(r"(_scale(_inv)?|\.qweight|\.qzeros|\.SCB|_packed)$", name) for name in unknown
    ):
        return (
            "quantised weights (FP8 or integers with scales), which are not read: convert them to "
            "bfloat16 first: "
        )
    if any("lora_" in name for name in unknown):
        return "a LoRA adapter lies here; merge it into its model first: "
    without = {name.removeprefix("model.") for name in missing if name.startswith("model.")}
    if without & set(unknown):
        return (
            "a base model without the prefix `model.` of its tensors and, it may be, without "
            "lm_head; save it as a causal language model first: "
        )
    return ""


def params_from_hf(table: HFTable, read: Callable[[str], np.ndarray]) -> dict[str, Any]:
    """Builds all parameters in memory from the tensors of a small checkpoint.

    The result is a nested dict that `nnx.replace_by_pure_dict(state, ...)` takes, with `state`
    the model's (`nnx.state(model)`). Files are loaded by `dsjax.weights.load_weights` instead,
    which never holds the whole model on the host.

    Args:
        table: the model's.
        read: returns the tensor of a name, in any float type; each parameter takes the type of
            its first tensor.

    Raises:
        ValueError: a tensor's shape is not the table's.
    """
    params: dict[str, Any] = {}

    def read_flat(name: str, start: int, stop: int) -> np.ndarray:
        array = np.asarray(read(name))
        expected = table.tensors[name].shape
        if array.shape != expected:
            raise ValueError(f"tensor {name}: shape {array.shape} must be {expected}")
        return array.reshape(-1)[start:stop]

    for path, param in table.params.items():
        whole = tuple(slice(0, size) for size in param.shape)
        node = params
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = param.read(whole, read_flat)
    return params


def params_to_hf(table: HFTable, params: Mapping[str, Any]) -> Iterable[tuple[str, np.ndarray]]:
    """Yields every tensor of the checkpoint from a nested dict of parameters, one at a time."""

    def read(part: Part) -> np.ndarray:
        stacked: Any = functools.reduce(operator.getitem, part.path, params)
        return np.asarray(stacked[part.index])

    for name, tensor in table.tensors.items():
        yield name, tensor.from_parts(read)


def place(
    row: Row,
    sizes: Mapping[str, int],
    prefix: str = "",
    stack: Path = (),
    index: tuple[int, ...] = (),
) -> HFTensor:
    """Makes the tensor that a row describes at one place of a model.

    Args:
        row: the row.
        sizes: of each letter.
        prefix: what goes before the row's name, such as "model.layers.3.".
        stack: the path that its parameters' paths continue.
        index: of the layer within its stack, then of the expert.
    """
    shape, view, parts = _parse(row, tuple(sizes.items()))
    name = prefix + row.name.format(expert=index[-1] if index else 0)
    placed = tuple(Part(stack + path, index, split, order) for path, split, order in parts)
    return HFTensor(name, shape, view, placed)


@functools.cache  # every expert has the same rows
def _parse(
    row: Row, size_items: tuple[tuple[str, int], ...]
) -> tuple[tuple[int, ...], tuple[int, ...], list[tuple[Path, tuple[int, slice], tuple[int, ...]]]]:
    """Returns a row's shape and view, and the path, split and order of each of its parts."""
    sizes = dict(size_items)

    def size(dim: str) -> int:
        return sum(sizes[letter] for letter in dim.split("+"))

    dims = re.findall(r"[^\s()]+", row.layout)
    view = tuple(size(dim) for dim in dims)
    joined = re.findall(r"\(([^)]*)\)|(\S+)", row.layout)
    shape = tuple(math.prod(map(size, (group or single).split())) for group, single in joined)
    parts = []
    for text in row.parts:
        path, layout = text.split(": ")
        order, split = [], (0, slice(0, view[0]))
        for dim in layout.split():
            axis = next(i for i, all_ in enumerate(dims) if dim == all_ or dim in all_.split("+"))
            if dim != dims[axis]:
                before, _, _ = dims[axis].partition(dim)
                start = size(before.rstrip("+")) if before else 0
                split = (axis, slice(start, start + size(dim)))
            order.append(axis)
        parts.append((tuple(path.split(".")), split, tuple(order)))
    return shape, view, parts


def _collect_params(tensors: Mapping[str, HFTensor]) -> dict[Path, Param]:
    pieces: dict[Path, dict[tuple[int, ...], tuple[HFTensor, Part]]] = {}
    for tensor in tensors.values():
        for part in tensor.parts:
            pieces.setdefault(part.path, {})[part.index] = (tensor, part)
    params = {}
    for path, by_index in pieces.items():
        last = max(by_index)
        tensor, part = by_index[last]
        stacked = tuple(i + 1 for i in last)
        assert len(by_index) == math.prod(stacked), path
        params[path] = Param(stacked + tensor.part_shape(part), by_index)
    return params
