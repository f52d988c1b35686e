"""What the tests want to know of a program that libtpu compiled, read from its text."""

import math
import re
from dataclasses import asdict
from typing import Any

import jax

from dsjax.plan import count_collectives

_EXCHANGE = re.compile(r"%(\S+) = (.*?) ragged-all-to-all(-start)?\(")
_ARRAY = re.compile(r"\b(bf16|s32|f32)\[([\d,]+)\]")
_PRODUCT = re.compile(
    r"%(\S+) = .* (?:fusion|convolution|custom-call)\(.*"
    r"op_name=\"[^\"]*(?:dot_general|/grouped_\w+/pallas_call)"
)


def kernels_and_memory(compiled) -> dict[str, Any]:
    """The kernels in it, its temporary bytes and the shapes that it copies."""
    text = compiled.as_text()
    return {
        "kernels": re.findall(
            r"%?([a-z_]+)[\w.\-]* = [^\n]*custom_call_target=\"tpu_custom_call\"", text
        ),
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
        "copied": re.findall(r"= \w+\[([\d,]+)\]\S* copy\(", text),
    }


def grouped_kernels(compiled) -> dict[str, Any]:
    """The experts' kernels in it and its temporary bytes."""
    # Differentiation adds to the names, before and after.
    kernels = re.findall(
        r"(grouped_(?:matmul|swiglu|weight_gradient))[\w.\-]* = "
        r"[^\n]*custom_call_target=\"tpu_custom_call\"",
        compiled.as_text(),
    )
    return {"kernels": kernels, "temporary": compiled.memory_analysis().temp_size_in_bytes}


def exchanges(compiled) -> dict[str, Any]:
    """Its experts' kernels and memory, its exchanges, and the products that run beside each."""
    lines = compiled.as_text().splitlines()
    exchanges, beside = [], []  # type: list[list[str | int]], list[list[str]]
    for number, line in enumerate(lines):
        found = _EXCHANGE.search(line)
        if found is None:
            continue
        # A start's result names first what is sent, then what is filled.
        dtype, shape = _ARRAY.findall(found[2])[1 if found[3] else 0]
        size = {"bf16": 2, "s32": 4, "f32": 4}[dtype]
        exchanges.append([dtype, size * math.prod(int(size) for size in shape.split(","))])
        beside.append([])
        for later in lines[number + 1 :] if found[3] else ():
            if f"ragged-all-to-all-done(%{found[1]})" in later:
                break
            beside[-1] += [product[1] for product in [_PRODUCT.search(later)] if product]
    return {
        "kernels": sorted(
            set(
                re.findall(
                    r"(grouped_[a-z]+(?:_[a-z]+)*)[\w.\-]* = [^\n]*tpu_custom_call",
                    "\n".join(lines),
                )
            )
        ),
        "exchanges": exchanges,
        "beside": beside,
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
    }


def collectives_and_memory(compiled) -> dict[str, Any]:
    """Its collectives, loops multiplied out, and the bytes that a chip needs."""
    memory = compiled.memory_analysis()
    return {
        "arguments": memory.argument_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
        "collectives": {
            name: asdict(use)
            for name, use in count_collectives(compiled.as_text(), _mesh_of(compiled)).items()
        },
    }


def _mesh_of(compiled) -> dict[str, int]:
    """The axes of the mesh that the program's arguments lie on."""
    return dict(jax.tree.leaves(compiled.input_shardings)[0].mesh.shape)
