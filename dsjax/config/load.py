"""Config files and dotted overrides: text from a person becomes one checked dataclass."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import json
import runpy
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsjax.config.fitting import MISFIT, describe, fit
from dsjax.config.huggingface import from_hf_config
from dsjax.config.model import ModelConfig
from dsjax.config.runtime import RuntimeConfig
from dsjax.config.train import TrainConfig


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> ModelConfig | TrainConfig:
    """Loads the config that a file holds and applies overrides to it.

    Args:
        path: a Python file that binds `config`, or a Hugging Face `config.json` or its folder.
        overrides: strings such as "model.moe.top_k=2".

    Raises:
        ValueError: the file holds no config, or an override does not fit; names which.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such config")
    if path.suffix == ".json":
        config: Any = from_hf_config(read_json(path))
    else:
        config = _run_config_file(path.resolve())
    return override(config, overrides)


def load_model_config(path: str | Path, overrides: Sequence[str] = ()) -> ModelConfig:
    """Loads a model's config; of a run's config file, the run's model."""
    config = load_config(path)
    if isinstance(config, TrainConfig):
        config = config.model
    return override(config, overrides)


def load_model_and_runtime(
    path: str | Path, overrides: Sequence[str] = ()
) -> tuple[ModelConfig, RuntimeConfig]:
    """Loads a model's config and how it is run; of a run's config file, the run's.

    Args:
        path: as for `load_config`.
        overrides: of the model ("num_layers=8"), and of the runtime ("runtime.dtype=float32").
    """
    config = load_config(path)
    if isinstance(config, TrainConfig):
        model, runtime = config.model, config.runtime
    else:
        model, runtime = config, RuntimeConfig()
    prefix = "runtime."
    of_runtime = [text.removeprefix(prefix) for text in overrides if text.startswith(prefix)]
    of_model = [text for text in overrides if not text.startswith(prefix)]
    return override(model, of_model), override(runtime, of_runtime)


def load_train_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Loads a run's config.

    Raises:
        ValueError: the file describes a model, not a run.
    """
    config = load_config(path)
    if not isinstance(config, TrainConfig):
        raise ValueError(f"{path}: describes a model; training takes a run (configs/runs/)")
    return override(config, overrides)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object, naming the file where it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}, not an object")
    return value


def _run_config_file(path: Path) -> Any:
    # Run configs import model configs as `configs.models.x`, from the folder that holds `configs`.
    roots = [str(parent.parent) for parent in path.parents if parent.name == "configs"]
    added = [root for root in roots if root not in sys.path]
    sys.path[:0] = added
    try:
        config = runpy.run_path(str(path)).get("config")
    finally:
        for root in added:
            sys.path.remove(root)
    if not isinstance(config, ModelConfig | TrainConfig):
        raise ValueError(f"{path}: must bind `config` to a ModelConfig or TrainConfig")
    return config


def override[T](config: T, overrides: Sequence[str]) -> T:
    """Returns a copy of a config with dotted fields replaced.

    All overrides are applied before the result is checked, so that fields that depend on one
    another can change together.

    Args:
        config: a dataclass instance.
        overrides: strings "field.subfield=value"; a value is a Python literal or plain text.

    Raises:
        ValueError: an unknown field (names the nearest), or a value of the wrong type.
    """
    tree: dict[str, Any] = {}
    for text in overrides:
        key, separator, value = text.partition("=")
        if not separator:
            raise ValueError(f"override {text!r}: must be FIELD=VALUE")
        *parents, name = key.strip().split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ValueError(f"override {text!r}: {parent} is already set as a whole")
        node[name] = _Value(value.strip())
    return _apply(config, tree, "")


@dataclasses.dataclass(frozen=True)
class _Value:
    text: str


def _apply(config: Any, tree: Mapping[str, Any], prefix: str) -> Any:
    hints = typing.get_type_hints(type(config))
    names = [f.name for f in dataclasses.fields(config)]
    changes: dict[str, Any] = {}
    for name, node in tree.items():
        key = prefix + name
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else f"; fields are {names}"
            raise ValueError(f"{key}: no such config field{hint}")
        current = getattr(config, name)
        if isinstance(node, _Value):
            changes[name] = _parse(key, node.text, hints[name])
        elif dataclasses.is_dataclass(current):
            changes[name] = _apply(current, node, key + ".")
        elif isinstance(current, tuple) and all(part.isdigit() for part in node):
            changes[name] = _apply_items(key, current, node)
        elif current is None and (kind := _dataclass_in(hints[name])) is not None:
            changes[name] = _switch_on(kind, node, key)
        else:
            raise ValueError(f"{key}.{next(iter(node))}: {key}={current!r} has no fields")
    return dataclasses.replace(config, **changes)


def _apply_items(key: str, current: tuple[Any, ...], node: Mapping[str, Any]) -> tuple[Any, ...]:
    items = list(current)
    for index, sub in node.items():
        if int(index) >= len(items):
            raise ValueError(f"{key}.{index}: {key} has {len(items)} entries")
        items[int(index)] = _apply(items[int(index)], sub, f"{key}.{index}.")
    return tuple(items)


def _switch_on(kind: Any, node: Mapping[str, Any], key: str) -> Any:
    """Builds an optional part that is not there yet from the fields given for it."""
    try:
        start = kind()
    except TypeError:
        required = [
            f.name
            for f in dataclasses.fields(kind)
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        missing = [name for name in required if name not in node]
        if missing:
            raise ValueError(f"{key}: is none; to switch it on, also set {missing}") from None
        hints = typing.get_type_hints(kind)
        values = {n: _parse(f"{key}.{n}", node[n].text, hints[n]) for n in required}
        start = kind(**values)
    return _apply(start, node, key + ".")


def _dataclass_in(hint: Any) -> Any:
    options = typing.get_args(hint)
    return next((option for option in options if dataclasses.is_dataclass(option)), None)


def _parse(key: str, text: str, hint: Any) -> Any:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = {"none": None, "true": True, "false": False}.get(text.lower(), text)
    fitted = fit(value, hint)
    if fitted is MISFIT:
        fitted = fit(text, hint)  # a string field may hold text that reads as a literal
    if fitted is MISFIT:
        raise ValueError(f"{key}={text}: must be {describe(hint)}")
    return fitted
