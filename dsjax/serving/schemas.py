"""What is wrong with a JSON schema before a grammar is made of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_MAX_DEPTH = 48
_MAX_CHARS = 1 << 18
_MAX_PARTS = 20_000


def check_schema(schema: Any, field: str) -> None:
    """Refuses a schema that is none, is too large, or that no finite text can meet.

    Args:
        schema: as JSON gives it.
        field: named by errors.

    Raises:
        ValueError: says why.
    """
    if not isinstance(schema, Mapping | bool):
        raise ValueError(f"{field}: must be an object or a boolean, not {type(schema).__name__}")
    if schema is False:
        raise ValueError(f"{field}: no text can meet it")
    stack, count = [(schema, 1)], 0
    while stack:
        part, depth = stack.pop()
        count += 1
        if depth > _MAX_DEPTH:
            raise ValueError(f"{field}: is nested deeper than {_MAX_DEPTH}")
        if count > _MAX_PARTS:
            raise ValueError(f"{field}: has more than {_MAX_PARTS} parts")
        children = part.values() if isinstance(part, Mapping) else part
        if isinstance(part, Mapping | list | tuple):
            stack += [(child, depth + 1) for child in children]  # type: ignore[union-attr]
    size = len(json.dumps(schema))
    if size > _MAX_CHARS:
        raise ValueError(f"{field}: has {size} characters, at most {_MAX_CHARS} are taken")
    if not _ends(schema):
        raise ValueError(f"{field}: refers to itself without an end, so no text can meet it")


def _ends(schema: Any) -> bool:
    """Whether some finite value is not ruled out by references that go round in a circle.

    The least fixed point: what a reference leads to is held endless until it is shown to end.
    """
    ending: set[str] = set()
    referred: set[str] = set()

    def ends(part: Any) -> bool:
        if not isinstance(part, Mapping):
            return True
        if "const" in part or "enum" in part:
            return True
        verdict = True
        reference = part.get("$ref")
        if isinstance(reference, str) and reference.startswith("#"):
            referred.add(reference)
            verdict = reference in ending
        for name in ("anyOf", "oneOf"):
            options = part.get(name)
            if isinstance(options, list) and options:
                verdict = verdict and any(ends(option) for option in options)
        if isinstance(part.get("allOf"), list):
            verdict = verdict and all(ends(option) for option in part["allOf"])
        kinds = part.get("type")
        kinds = kinds if isinstance(kinds, list) else [kinds]
        # Where another type will do, or none is asked for, a number meets all of what follows.
        if kinds == ["object"]:
            properties, required = part.get("properties"), part.get("required")
            if isinstance(properties, Mapping) and isinstance(required, list):
                named = [properties.get(n) for n in required if isinstance(n, str)]
                verdict = verdict and all(ends(one) for one in named)
        elif kinds == ["array"] and isinstance(part.get("minItems"), int) and part["minItems"] > 0:
            first = part.get("prefixItems")
            first = first[: part["minItems"]] if isinstance(first, list) else []
            verdict = verdict and all(ends(one) for one in first)
            if part["minItems"] > len(first):
                verdict = verdict and ends(part.get("items"))
        return verdict

    while True:
        before = len(ending) + len(referred)
        found = ends(schema)
        for reference in [*referred]:
            target = _target(schema, reference)
            # A reference that leads nowhere is refused where the grammar is made.
            if target is None or ends(target):
                ending.add(reference)
        if found or len(ending) + len(referred) == before:
            return ends(schema)


def _target(schema: Any, reference: str) -> Any:
    part = schema
    for step in reference.removeprefix("#").split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        if isinstance(part, Mapping) and step in part:
            part = part[step]
        elif isinstance(part, list) and step.isdigit() and int(step) < len(part):
            part = part[int(step)]
        else:
            return None
    return part
