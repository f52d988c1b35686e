"""What the scripts' command lines share: what is wrong with an argument is one line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection

from dsjax.cli.errors import one_line_errors

__all__ = ["IMPLEMENTATIONS", "names_of", "numbers", "one_line_errors", "positive"]

IMPLEMENTATIONS = ("reference", "xla", "tpu", "hopper")


def positive(text: str) -> int:
    """Reads a whole number from 1 to 2**31 - 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if not 1 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return value


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

    def read(text: str) -> str:
        for name in text.split(","):
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} must be one of {', '.join(known)}")
        return text

    return read
