"""Config files and dotted overrides: text from a person becomes one checked dataclass."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import os
import runpy
import traceback
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsjax.config.fitting import MISFIT, describe, fit
from dsjax.config.model import ModelConfig
from dsjax.config.quantisation import RECIPES, QuantisationConfig
from dsjax.config.run_file import RUN_FILE
from dsjax.config.runtime import RuntimeConfig
from dsjax.config.train import TrainConfig

# The models and runs that come with the package, as `models/NAME.py` and `runs/NAME.py`.
CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def load_config(
    name_or_path: str | Path, overrides: Sequence[str] = ()
) -> ModelConfig | TrainConfig:
    """Loads the config of a name or a file and applies overrides to it.

    Args:
        name_or_path: a model or run that comes with the package, such as "deepseek_v2", or a Python
            file that binds `config`.
        overrides: strings such as "model.moe.top_k=2".

    Raises:
        ValueError: the file holds no config, or an override does not fit; names which.
        FileNotFoundError: there is no such name or file; gives the nearest names.
    """
    path = find_config(name_or_path)
    if path.suffix != ".py":
        raise ValueError(f"{path}: no config file of ours, which is Python and binds `config`")
    config = _bound_in(path)
    if not isinstance(config, ModelConfig | TrainConfig):
        raise ValueError(f"{path}: must bind `config` to a ModelConfig or TrainConfig")
    return override(config, overrides)


def load_model_config(name_or_path: str | Path, overrides: Sequence[str] = ()) -> ModelConfig:
    """Loads a model's config; of a run, the run's model."""
    config = load_config(name_or_path)
    if isinstance(config, TrainConfig):
        config = config.model
    return override(config, overrides)


def load_model_and_runtime(
    name_or_path: str | Path, overrides: Sequence[str] = ()
) -> tuple[ModelConfig, RuntimeConfig]:
    """Loads a model's config and how it is run; of a run's config, the run's.

    Args:
        name_or_path: as for `load_config`.
        overrides: of the model ("num_layers=8"), and of the runtime ("runtime.dtype=float32").
    """
    config = load_config(name_or_path)
    if isinstance(config, TrainConfig):
        model, runtime = config.model, config.runtime
    else:
        model, runtime = config, RuntimeConfig()
    prefix = "runtime."
    of_runtime = [text.removeprefix(prefix) for text in overrides if text.startswith(prefix)]
    of_model = [text for text in overrides if not text.startswith(prefix)]
    return override(model, of_model), override(runtime, of_runtime)


def load_train_config(name_or_path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Loads a run's config.

    Raises:
        ValueError: the name or file is a model's, not a run's.
    """
    config = load_config(name_or_path)
    if not isinstance(config, TrainConfig):
        raise ValueError(f"{name_or_path}: describes a model; training takes a run (quickstart)")
    return override(config, overrides)


def load_recipe(name_or_path: str | Path | QuantisationConfig) -> QuantisationConfig:
    """Returns a recipe for quantising weights.

    Args:
        name_or_path: "int8", "fp8" or "int4", a Python file that binds `config` to one, or the
            recipe itself.

    Raises:
        ValueError: an unknown name, or a file that holds no recipe.
    """
    if isinstance(name_or_path, QuantisationConfig):
        return name_or_path
    if str(name_or_path) in RECIPES:
        return RECIPES[str(name_or_path)]
    path = Path(name_or_path).expanduser()
    if path.suffix != ".py" or not path.is_file():
        raise ValueError(
            f"quantize={str(name_or_path)!r}: must be one of {', '.join(RECIPES)}, or a Python "
            "file of a recipe"
        )
    config = _bound_in(path)
    if not isinstance(config, QuantisationConfig):
        raise ValueError(f"{path}: must bind `config` to a QuantisationConfig")
    return config


def _bound_in(path: Path) -> Any:
    """Runs a Python file and returns what it binds `config` to.

    Raises:
        ValueError: it cannot be run; names the file, its line and what is wrong there.
    """
    try:
        return runpy.run_path(str(path)).get("config")
    except (Exception, SystemExit) as error:
        at = error.lineno if isinstance(error, SyntaxError) else None
        for frame, line in traceback.walk_tb(error.__traceback__):
            at = line if frame.f_code.co_filename == str(path) else at  # the innermost of the file
        place = path if at is None else f"{path}:{at}"
        # What our configs refuse says enough; a KeyError's text, say, is but a name.
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        text = error.msg if isinstance(error, SyntaxError) else error
        raise ValueError(f"{place}: {kind}{text}") from error


def named_configs() -> dict[str, Path]:
    """Returns the file of every model and run that comes with the package, by name."""
    return {path.stem: path for path in sorted(CONFIGS.glob("*/*.py"))}


def find_config(name_or_path: str | Path) -> Path:
    """Returns the file of a config; a name that comes with the package goes before a path.

    Raises:
        FileNotFoundError: there is no such name or file; gives the nearest names.
    """
    if not isinstance(name_or_path, str | os.PathLike):
        raise TypeError(f"config={name_or_path!r}: must be a config, its name or its file")
    names = named_configs()
    if str(name_or_path) in names:
        return names[str(name_or_path)]
    path = Path(name_or_path).expanduser()
    if not str(name_or_path):
        raise FileNotFoundError("'': names no config")
    if path.is_dir():
        if (path / "config.json").exists():
            return path / "config.json"
        what = "a run, which goes on by its name or file" if (path / RUN_FILE).exists() else ""
        raise FileNotFoundError(
            f"{path}: is a folder ({what or 'without config.json'}), not a config"
        )
    if path.exists():
        return path
    if len(path.parts) > 1 or path.suffix:  # no name, so a path was meant
        raise FileNotFoundError(f"{path}: no such config")
    near = difflib.get_close_matches(path.name, names)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names)}"
    raise FileNotFoundError(f"{path}: no such config; {hint}")


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
    if isinstance(overrides, str):
        raise TypeError(f"overrides={overrides!r}: must be a list of FIELD=VALUE, not one string")
    tree: dict[str, Any] = {}
    for text in overrides:
        key, separator, value = text.partition("=")
        if not separator:
            raise ValueError(f"override {text!r}: must be FIELD=VALUE")
        *parents, name = key.strip().split(".")
        if not all((*parents, name)):
            raise ValueError(f"override {text!r}: must be FIELD=VALUE, its field has an empty name")
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
