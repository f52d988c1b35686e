"""Configs as JSON: what a checkpoint keeps of the model or run that made it."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from dsjax.config.fitting import MISFIT, describe, fit


def to_json(config: Any) -> dict[str, Any]:
    """Returns a config as nested dicts and lists that `json` can write."""
    return {f.name: _value_to_json(getattr(config, f.name)) for f in dataclasses.fields(config)}


def from_json[T](kind: type[T], value: Mapping[str, Any], where: str = "") -> T:
    """Builds a config from what `to_json` gave.

    Args:
        kind: the dataclass, such as ModelConfig.
        value: nested dicts and lists.
        where: dotted prefix of the fields named in errors, such as a file's name.

    Raises:
        ValueError: an unknown or missing field, or a value that the config refuses.
    """
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(value) - set(hints))
    if unknown:
        raise ValueError(f"{where}{kind.__name__}: unknown fields {unknown}")
    fields = {}
    for name, item in value.items():
        built = _value_from_json(hints[name], item, f"{where}{name}.")
        fields[name] = fit(built, hints[name])
        if fields[name] is MISFIT:
            raise ValueError(f"{where}{name}={item!r}: must be {describe(hints[name])}")
    try:
        return kind(**fields)
    except TypeError as error:
        raise ValueError(f"{where}{kind.__name__}: {error}") from None


def differing_fields(there: Any, here: Any, prefix: str = "") -> list[str]:
    """Returns what differs between two configs of one kind, such as "model.num_layers=2, not 4".

    Args:
        there: the config whose values are named first.
        here: the other one.
        prefix: dotted prefix of the fields.
    """
    found = []
    for field in dataclasses.fields(there):
        a, b = getattr(there, field.name), getattr(here, field.name)
        if dataclasses.is_dataclass(a) and type(a) is type(b):
            found += differing_fields(a, b, f"{prefix}{field.name}.")
        elif a != b:
            found.append(f"{prefix}{field.name}={a!r}, not {b!r}")
    return found


def _value_to_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_json(value)
    if isinstance(value, tuple):
        return [_value_to_json(item) for item in value]
    return value


def _value_from_json(hint: Any, value: Any, where: str) -> Any:
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        hint = next(option for option in options if option is not type(None))
        return _value_from_json(hint, value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_value_from_json(options[0], item, where) for item in value)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return from_json(typing.cast(type, hint), value, where)
    return value
