"""The forms that weights are stored in, by the names that recipes use."""

from __future__ import annotations

import re

from pallas_kernels.quantised import SCALE_BLOCK, Format


def format_of(name: str) -> Format | None:
    """Returns the form of a recipe's name; None for weights that stay as they are.

    Args:
        name: one of `config.quantisation.FORMATS`.
    """
    if name == "bfloat16":
        return None
    if name == "int8":
        return Format("int8")
    if name == "fp8":
        return Format("float8_e4m3fn")
    if name == "fp8_block128":  # DeepSeek-V3's
        return Format("float8_e4m3fn", SCALE_BLOCK, SCALE_BLOCK, scale_dtype="float32")
    if name == "fp8_row128":
        return Format("float8_e4m3fn", SCALE_BLOCK, scale_dtype="float32")
    parts = re.fullmatch(r"int4_g(\d+)(_zero)?", name)
    assert parts is not None, name
    return Format("int4" if parts[2] is None else "uint4", int(parts[1]))
