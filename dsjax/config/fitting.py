"""Values from a file or a command line, fitted to the type that a config field declares."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import os
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
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        if hint is float:
            return float(value)
        if hint is int and value == value // 1:
            return math.floor(value)  # as other software may write a whole number, or NumPy's
    if hint is str and isinstance(value, os.PathLike):
        return os.fspath(value)
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


def checked[T](kind: type[T]) -> type[T]:
    """Makes a dataclass refuse a field whose value is of another type, before its other checks.

    A list becomes the tuple, a path the string and a float like 2.0 the whole number that the field
    declares, so that configs that mean the same are equal, hashable and written alike.
    """
    check = kind.__post_init__  # type: ignore[attr-defined]
    hints: dict[str, Any] = {}  # found when first needed: a class may name one that comes later

    @functools.wraps(check)
    def check_all(self: Any) -> None:
        if not hints:
            hints.update(typing.get_type_hints(kind))
        for name in (field.name for field in dataclasses.fields(self)):
            hint = hints[name]
            value = getattr(self, name)
            fitted = fit(value, hint)
            if fitted is MISFIT:
                if typing.get_origin(hint) is typing.Literal and isinstance(value, str):
                    check(self)  # may say why it is no choice
                what = f"{type(self).__name__}.{name}={value!r}"
                wanted = describe(hint)
                if not wanted.startswith("one of "):
                    wanted += f", not {type(value).__name__}"
                raise ValueError(f"{what}: must be {wanted}")
            if type(fitted) is not type(value) and hint is not float:
                object.__setattr__(self, name, fitted)
        check(self)

    kind.__post_init__ = check_all  # type: ignore[attr-defined]
    return kind
