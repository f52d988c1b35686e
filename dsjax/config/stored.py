"""What a checkpoint keeps of its config: JSON with a format version, older versions read too.

Format 1 kept `dtype`, `param_dtype` and `remat` with the model. Format 2 keeps them with the run,
and a converted model, which is no run, has none of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsjax.config.model import ModelConfig
from dsjax.config.quantisation import QuantisationConfig
from dsjax.config.serialize import from_json, to_json
from dsjax.config.train import TrainConfig

FORMAT = 2

_RUNTIME_FIELDS_OF_FORMAT_1 = ("dtype", "param_dtype", "remat")


def run_to_json(config: TrainConfig) -> dict[str, Any]:
    """Returns what `run.json` holds."""
    return {"format": FORMAT, **to_json(config)}


def run_from_json(content: Mapping[str, Any], where: str) -> TrainConfig:
    """Builds a run's config from what its `run.json` holds.

    Args:
        content: the file as JSON, of this format or of an older one.
        where: the file, for messages.

    Raises:
        ValueError: a newer format, or a field that the config refuses; names the file.
    """
    content = dict(content)
    if _format(content.pop("format", 1), where) == 1:
        model, runtime = _split_runtime(content.get("model", {}))
        content |= {"model": model, "runtime": runtime}
    return from_json(TrainConfig, content, f"{where}: ")


def model_to_json(config: ModelConfig, recipe: QuantisationConfig | None = None) -> dict[str, Any]:
    """Returns what `dsjax.json` holds: the model, and the recipe where it is quantised."""
    content: dict[str, Any] = {"format": FORMAT, "model": to_json(config)}
    return content if recipe is None else content | {"quantisation": to_json(recipe)}


def recipe_from_json(content: Mapping[str, Any], where: str) -> QuantisationConfig | None:
    """Builds the recipe that a model's `dsjax.json` holds; None where it is not quantised.

    Raises:
        ValueError: a field that the recipe refuses; names the file.
    """
    recipe = content.get("quantisation")
    if recipe is None:
        return None
    return from_json(QuantisationConfig, recipe, f"{where}: quantisation.")


def model_from_json(content: Mapping[str, Any], where: str) -> ModelConfig:
    """Builds a model's config from what its `dsjax.json` holds.

    Args:
        content: the file as JSON, of this format or of an older one.
        where: the file, for messages.

    Raises:
        ValueError: a newer format, or a field that the config refuses; names the file.
    """
    model = content.get("model", {})
    if _format(content.get("format"), where) == 1:
        model, _ = _split_runtime(model)
    return from_json(ModelConfig, model, f"{where}: model.")


def _format(found: Any, where: str) -> int:
    if found not in (1, FORMAT):
        raise ValueError(f"{where}: format={found!r}: this version reads 1 and {FORMAT}")
    return int(found)


def _split_runtime(model: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    runtime = {name: model[name] for name in _RUNTIME_FIELDS_OF_FORMAT_1 if name in model}
    return {name: value for name, value in model.items() if name not in runtime}, runtime
