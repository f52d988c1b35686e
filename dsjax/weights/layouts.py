"""The paths of parameters in checkpoints, of this format and of older ones.

In format 1 a matrix was a parameter of its own, `attention.wo`; now it is the weight of a module,
`attention.wo.weight`. The router's was `router.weight` and is `router.gate.weight`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

Path = tuple[str, ...]

# Of a module: a matrix or a norm, and what a matrix in fewer bits has beside its numbers.
_PARTS = ("weight", "scales", "zeros")


def current_path(stored: Path) -> Path:
    """Returns the path that a stored parameter has today."""
    if stored[-2:] == ("router", "weight"):
        return (*stored[:-1], "gate", "weight")
    return stored if stored[-1] in _PARTS else (*stored, "weight")


def format_1_path(path: Path) -> Path:
    """Returns the path that a parameter had in format 1; undoes `current_path`."""
    if path[-3:] == ("router", "gate", "weight"):
        return (*path[:-2], "weight")
    # Norms were modules then as well.
    return path if path[-2].endswith("norm") else path[:-1]


def is_format_1(stored: Iterable[Path]) -> bool:
    """Tells from a checkpoint's paths whether it is of format 1."""
    return any(path[-1] not in _PARTS for path in stored)


def renamed(tree: Mapping[str, Any], rename: Callable[[Path], Path]) -> dict[str, Any]:
    """Returns a nested dict with every leaf at another path."""
    result: dict[str, Any] = {}
    for path, leaf in _leaves(tree, ()):
        *parents, name = rename(path)
        node = result
        for key in parents:
            node = node.setdefault(key, {})
        node[name] = leaf
    return result


def _leaves(tree: Mapping[str, Any], path: Path) -> Iterable[tuple[Path, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value
