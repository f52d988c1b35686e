"""Values from a file or a command line, fitted to the type that a config field declares."""

from __future__ import annotations

import types
import typing
from typing import Any

MISFIT = object()


def fit(value: Any, hint: Any) -> Any:
    """Returns the value as the type that the hint asks for, or MISFIT."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        fitted = (fit(value, option) for option in options)
        return next((v for v in fitted if v is not MISFIT), MISFIT)
    if origin is typing.Literal:
        return value if value in options else MISFIT
    if origin is tuple:
        if not isinstance(value, tuple | list):
            value = (value,)
        items = tuple(fit(item, options[0]) for item in value)
        return MISFIT if MISFIT in items else items
    if hint is type(None):
        return None if value is None else MISFIT
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)  # as other software may write a whole number
    return value if type(value) is hint else MISFIT


def describe(hint: Any) -> str:
    """Returns what `fit` accepts for a hint, in words."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, options))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(option) for option in options)
    if origin is tuple:
        return f"a tuple of {describe(options[0])}"
    return "none" if hint is type(None) else getattr(hint, "__name__", str(hint))
