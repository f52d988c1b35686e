"""What the scripts' command lines share: what is wrong with an argument is one line."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Collection
from pathlib import Path

from dsjax.cli.errors import one_line_errors
from dsjax.config.engine import memory_bytes
from dsjax.mesh import MESH_AXES

__all__ = [
    "IMPLEMENTATIONS",
    "axis",
    "command_line",
    "names_of",
    "not_negative",
    "num_bytes",
    "numbers",
    "one_line_errors",
    "png",
    "positive",
    "real",
    "several",
]

IMPLEMENTATIONS = ("reference", "xla", "tpu", "hopper")


def command_line(about: str | None) -> argparse.ArgumentParser:
    """Returns a parser whose help is the file's docstring, line by line as it is written there."""
    return argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def positive(text: str) -> int:
    """Reads a whole number from 1 to 2**31 - 1."""
    return _whole(text, 1, 2**31)


def not_negative(text: str) -> int:
    """Reads a whole number from 0 to 2**31 - 1."""
    return _whole(text, 0, 2**31)


def num_bytes(text: str) -> int:
    """Reads a size in bytes, or such as "16GiB"."""
    try:
        return memory_bytes(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be a size such as 16GiB") from None


def png(text: str) -> Path:
    """Reads the name of a picture to write."""
    if not text.endswith(".png"):
        raise argparse.ArgumentTypeError(f"'{text}' must end in .png")
    return Path(text)


def real(text: str) -> float:
    """Reads a finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of at least 0")
    return value


def _whole(text: str, least: int, end: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if not least <= value < end:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least {least}")
    return value


def axis(text: str) -> str:
    """Reads the size of a mesh's axis, such as "expert=2", and returns it as it is written."""
    name, _, size = text.partition("=")
    if name not in MESH_AXES:
        raise argparse.ArgumentTypeError(f"{text!r} must be AXIS=N, of {', '.join(MESH_AXES)}")
    positive(size)
    return text


def several(read: Callable[[str], object]) -> Callable[[str], str]:
    """Gives what reads values with commas between and returns them as they are written."""

    def read_all(text: str) -> str:
        for part in text.split(","):
            read(part)
        return text

    return read_all


def numbers(count: int) -> Callable[[str], str]:
    """Gives what reads sizes such as "16x4096" and returns them as they are written."""

    def read(text: str) -> str:
        parts = text.split("x")
        if len(parts) != count:
            raise argparse.ArgumentTypeError(f"{text!r} must be {count} numbers with x between")
        for part in parts:
            positive(part)
        return text

    return read


def names_of(known: Collection[str]) -> Callable[[str], str]:
    """Gives what reads names with commas between and returns them as they are written."""

    def read(name: str) -> None:
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name!r} must be one of {', '.join(known)}")

    return several(read)
