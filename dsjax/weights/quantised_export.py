"""Quantised weights as other software's files hold them: compressed-tensors, and V3's fp8 blocks.

Whole numbers become compressed-tensors' `pack-quantized`, float8 with a scale a column its
`float-quantized`, float8 in blocks of 128 x 128 what DeepSeek-V3's release has. What the format
chosen has no place for is written in bfloat16, and said.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from dsjax.families.tensors import HFTensor, Part
from dsjax.weights.sources import CheckpointSource
from dsjax.weights.stored_params import StoredParams, stored_params
from pallas_kernels.quantised import SCALE_BLOCK, Format, pack_halves

_LOG = logging.getLogger(__name__)

_EMBEDDING = "model.embed_tokens.weight"
Entry = tuple[str, tuple[int, ...]]  # stored type and shape of one tensor of a file


@dataclass(frozen=True)
class QuantisedExport:
    """The files of a quantised checkpoint before they are written.

    Attributes:
        config: what `config.json` says of the format, `quantization_config`; None where all
            tensors are written widened.
        kinds: of each tensor that is written quantised how: "packed", "float" or "block".
        source: where the weights come from.
        dtype: type of the tensors that are widened; those that never were quantised keep theirs
            where it is None.
    """

    config: Mapping[str, Any] | None
    kinds: Mapping[str, str]
    source: CheckpointSource
    dtype: np.dtype | None

    @property
    def _params(self) -> StoredParams:
        return stored_params(self.source.config, self.source.recipe)

    def entries(self, tensor: HFTensor) -> dict[str, Entry]:
        """Returns stored type and shape of what a tensor becomes, by name."""
        kind, num_n = self.kinds.get(tensor.name), tensor.shape[0]
        if kind is None:
            return {tensor.name: (_stored_name(self._plain_dtype(tensor)), tensor.shape)}
        form = _form(tensor, self._params)
        assert form is not None
        num_k, groups = tensor.shape[1], form.num_blocks(tensor.shape[1])
        base = tensor.name.removesuffix("weight")
        if kind == "block":
            blocks = (-(-num_n // SCALE_BLOCK), groups)
            return {
                tensor.name: ("F8_E4M3", tensor.shape),
                f"{tensor.name}_scale_inv": ("F32", blocks),
            }
        scale = {f"{base}weight_scale": ("BF16", (num_n, groups))}
        if kind == "float":
            return {tensor.name: ("F8_E4M3", tensor.shape)} | scale
        words = -(-num_k * _bits(form) // 32)
        found: dict[str, Entry] = {
            f"{base}weight_packed": ("I32", (num_n, words)),
            **scale,
            f"{base}weight_shape": ("I64", (2,)),
        }
        if form.zero_points:
            found[f"{base}weight_zero_point"] = ("I32", (-(-num_n // 8), groups))
        return found

    def read(self, tensor: HFTensor) -> dict[str, np.ndarray]:
        """Returns what a tensor becomes, by name."""
        kind = self.kinds.get(tensor.name)
        if kind is None:
            dtype = self._plain_dtype(tensor)
            values = tensor.from_parts(lambda part: self._widened(tensor, part).astype(dtype))
            return {tensor.name: values}
        form = _form(tensor, self._params)
        assert form is not None
        values, scales = self._joined(tensor, "weight"), self._joined(tensor, "scales")
        base = tensor.name.removesuffix("weight")
        if kind == "block":
            return {tensor.name: values, f"{tensor.name}_scale_inv": scales.astype(np.float32)}
        found = {f"{base}weight_scale": scales.astype(jnp.bfloat16)}
        if kind == "float":
            return {tensor.name: values} | found
        found[f"{base}weight_packed"] = _words(values, form)
        found[f"{base}weight_shape"] = np.array(tensor.shape, np.int64)
        if form.zero_points:
            zeros = self._joined(tensor, "zeros").T.astype(jnp.uint4)
            found[f"{base}weight_zero_point"] = np.ascontiguousarray(_words(zeros, form).T)
        return found

    def _plain_dtype(self, tensor: HFTensor) -> np.dtype:
        """The type of a tensor that is written as plain numbers."""
        if self.dtype is not None:
            return self.dtype
        quantised = [part.path[:-1] in self._params.matrices for part in tensor.parts]
        if any(quantised):
            return jnp.dtype(jnp.bfloat16)
        return self.source.dtype(tensor.parts[0].path)

    def _leaf(self, part: Part, name: str) -> np.ndarray:
        """What is stored of one matrix, [*result's dims, *contracted dims or blocks]."""
        path = (*part.path[:-1], name)
        shape, _ = self._params.leaves[path]
        stacked = tuple(slice(i, i + 1) for i in part.index)
        inner = tuple(slice(0, size) for size in shape[len(part.index) :])
        return self.source.read(path, stacked + inner).reshape(shape[len(part.index) :])

    def _joined(self, tensor: HFTensor, name: str) -> np.ndarray:
        """What is stored of a tensor's parts, [N, K] or [blocks of N, blocks of K]."""
        leaves = [self._leaf(part, name) for part in tensor.parts]
        if len(leaves) == 1:
            sides, _ = self._params.matrices[tensor.parts[0].path[:-1]]
            contracted = sides.num_contracted if name == "weight" else 1
            rows = leaves[0].shape[: leaves[0].ndim - contracted]
            return leaves[0].reshape(math.prod(rows), -1)
        axis = tensor.parts[0].split[0]
        shape = list(leaves[0].shape)
        shape[axis] = tensor.view[axis]
        whole = np.empty(shape, leaves[0].dtype)
        for part, leaf in zip(tensor.parts, leaves, strict=True):
            whole[(slice(None),) * axis + (part.split[1],)] = leaf
        return whole.reshape(tensor.shape[0], -1)

    def _widened(self, tensor: HFTensor, part: Part) -> np.ndarray:
        """A part in its parameter's order of dims, as numbers."""
        matrix = self._params.matrices.get(part.path[:-1])
        if matrix is None:
            return self._leaf(part, "weight")
        sides, form = matrix
        values, scales = self._leaf(part, "weight"), self._leaf(part, "scales").astype(np.float32)
        ins = values.shape[values.ndim - sides.num_contracted :]
        outs = values.shape[: values.ndim - sides.num_contracted]
        num_n, num_k = math.prod(outs), math.prod(ins)

        def spread(blocks: np.ndarray) -> np.ndarray:
            blocks = blocks.reshape(-1, blocks.shape[-1])
            rows = np.repeat(blocks, form.block_out, axis=0)[:num_n]
            return np.repeat(rows, form.block_in or num_k, axis=1)[:, :num_k]

        numbers = values.astype(np.float32).reshape(num_n, num_k)
        if form.zero_points:
            numbers -= spread(self._leaf(part, "zeros").astype(np.float32))
        whole = (numbers * spread(scales)).reshape(*outs, *ins)
        places = tuple(range(len(outs), whole.ndim)) + tuple(range(len(outs)))
        return whole.transpose(places) if part.order != tuple(range(whole.ndim)) else whole


def plan_export(source: CheckpointSource, dtype: np.dtype | None) -> QuantisedExport:
    """Chooses how a quantised checkpoint is written for other software.

    Args:
        source: the checkpoint.
        dtype: a type that all tensors are widened to; None keeps them quantised.

    Raises:
        ValueError: no format of other software holds such weights together.
    """
    if dtype is not None:
        return QuantisedExport(None, {}, source, dtype)
    params = stored_params(source.config, source.recipe)
    kinds = {name: _kind(tensor, params) for name, tensor in source.table.tensors.items()}
    there = {kind for kind in kinds.values() if kind is not None}
    if "packed" in there and len(there) > 1:
        raise ValueError(
            f"{source.where}: no format of other software holds whole numbers and float8 together; "
            "convert with --dtype bfloat16, which widens them"
        )
    if "block" in there:  # V3's format has no scales a column
        there = {"block"}
    chosen = {name: kind for name, kind in kinds.items() if kind is not None and kind in there}
    widened = [
        name
        for name, tensor in source.table.tensors.items()
        if name not in chosen and any(part.path[:-1] in params.matrices for part in tensor.parts)
    ]
    if widened:
        shown = sorted({re.sub(r"\d+", "N", name) for name in widened})
        _LOG.warning("written in bfloat16, as the format has no place for them: %s", shown)
    if not chosen:
        raise ValueError(
            f"{source.where}: no format of other software holds these weights; convert with "
            "--dtype bfloat16, which widens them"
        )
    forms = {name: _form(source.table.tensors[name], params) for name in chosen}
    plain = [name for name, tensor in source.table.tensors.items() if _is_linear(tensor)]
    plain = [_module(name) for name in plain if name not in chosen]
    if there == {"block"}:
        config: dict[str, Any] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [SCALE_BLOCK, SCALE_BLOCK],
            "modules_to_not_convert": plain,
        }
    else:
        config = _compressed_config(forms, plain)
    return QuantisedExport(config, chosen, source, None)


def _compressed_config(forms: Mapping[str, Format | None], plain: list[str]) -> dict[str, Any]:
    """What compressed-tensors keeps in `config.json`: a group for each form, by modules' names."""
    groups: dict[str, Any] = {}
    by_pattern: dict[str, set[Format | None]] = {}
    for name, form in forms.items():
        by_pattern.setdefault(_pattern(name), set()).add(form)
    for form in dict.fromkeys(forms.values()):
        assert form is not None
        names = [name for name, its in forms.items() if its == form]
        # One expression for all layers and experts, where they are alike.
        alike = {_pattern(name): len(by_pattern[_pattern(name)]) == 1 for name in names}
        targets = {
            f"re:{_pattern(name)}$" if alike[_pattern(name)] else _module(name) for name in names
        }
        whole = form.block_in is None
        groups[f"group_{len(groups)}"] = {
            "targets": sorted(targets),
            "weights": {
                "num_bits": _bits(form),
                "type": "float" if form.dtype.startswith("float") else "int",
                "symmetric": not form.zero_points,
                "strategy": "channel" if whole else "group",
                "group_size": None if whole else form.block_in,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
        }
    is_float = any(form is not None and form.dtype.startswith("float") for form in forms.values())
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized" if is_float else "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": plain,
        "kv_cache_scheme": None,
    }


def _kind(tensor: HFTensor, params: StoredParams) -> str | None:
    """How a tensor can be written quantised; None where no format has a place for it."""
    form = _form(tensor, params)
    if form is None or tensor.name == _EMBEDDING:
        return None
    if form.dtype.startswith("float"):
        if form.block_in is None:
            return "float"
        return "block" if form.block_out == SCALE_BLOCK else None
    # Groups of compressed-tensors are whole.
    return None if form.block_in and tensor.shape[1] % form.block_in else "packed"


def _form(tensor: HFTensor, params: StoredParams) -> Format | None:
    """The form of all of a tensor's parts; None where they differ or are plain."""
    found = {params.matrices.get(part.path[:-1], (None, None))[1] for part in tensor.parts}
    return found.pop() if len(found) == 1 else None


def _words(values: np.ndarray, form: Format) -> np.ndarray:
    """Puts numbers of 4 or 8 bits, made positive, in int32 along the last dim, lowest first."""
    if _bits(form) == 8:
        numbers = (values.astype(np.int16) + 128).astype(np.uint8)
    else:
        offset = 0 if form.zero_points else 8
        numbers = pack_halves((values.astype(np.int8) + offset).astype(jnp.uint4))
    pad = [(0, 0)] * (numbers.ndim - 1) + [(0, -numbers.shape[-1] % 4)]
    return np.ascontiguousarray(np.pad(numbers, pad)).view("<i4")


def _bits(form: Format) -> int:
    return 4 if form.dtype in ("int4", "uint4") else 8


def _is_linear(tensor: HFTensor) -> bool:
    return len(tensor.shape) == 2 and tensor.name != _EMBEDDING


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _pattern(name: str) -> str:
    """A regular expression for a module's name in all layers and experts."""
    return re.sub(r"\d+", r"\\d+", re.escape(_module(name)).replace(r"\_", "_"))


def _stored_name(dtype: np.dtype) -> str:
    return {"float32": "F32", "bfloat16": "BF16"}[dtype.name]
