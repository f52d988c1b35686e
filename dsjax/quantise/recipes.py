"""What a recipe comes to for a model: the form of each of its matrices."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from dsjax.config import QuantisationConfig
from dsjax.quantise.formats import format_of
from pallas_kernels.quantised import Format

# Contracted over one dim by one form of attention, over another by the other.
_TWO_WAYS = re.compile(r".*\.(wk_b|wv_b)")
_FORMATS_OF_TWO_WAYS = ("bfloat16", "int8", "fp8", "fp8_row128")


def choose_formats(recipe: QuantisationConfig, names: Sequence[str]) -> dict[str, str]:
    """Returns the form of each matrix that a recipe quantises.

    Args:
        recipe: the recipe.
        names: the model's matrices, such as "moe_layers.attention.wo".

    Returns:
        The name of a form by the matrix's name; those that stay as they are, are not in it.

    Raises:
        ValueError: a rule matches no matrix, or gives one a form that it cannot take.
    """
    for rule in recipe.rules:
        if not any(re.fullmatch(rule.weights, name) for name in names):
            raise ValueError(
                f"quantisation.rules.weights={rule.weights!r}: matches no matrix of the model; "
                f"there are {', '.join(names)}"
            )
    chosen = {name: _first_match(recipe, name) for name in names}
    chosen = {name: form for name, form in chosen.items() if form != "bfloat16"}
    _check(chosen)
    return chosen


def form_of(recipe: QuantisationConfig | None, name: str) -> Format | None:
    """Returns the form in which a recipe stores a matrix; None where it stays as it is."""
    return None if recipe is None else format_of(_first_match(recipe, name))


def _first_match(recipe: QuantisationConfig, name: str) -> str:
    matching = (rule.format for rule in recipe.rules if re.fullmatch(rule.weights, name))
    return next(matching, "bfloat16")


def _check(chosen: Mapping[str, str]) -> None:
    """Checks that matrices can be stored in the forms chosen for them.

    Raises:
        ValueError: names the matrix and the form.
    """
    if not chosen:
        raise ValueError("quantisation.rules: they leave every matrix of the model as it is")
    for name, form in chosen.items():
        if _TWO_WAYS.fullmatch(name) and form not in _FORMATS_OF_TWO_WAYS:
            raise ValueError(
                f"quantisation: {name} cannot be {form}: it is contracted over two of its dims, so "
                "it takes int8, fp8 or bfloat16"
            )
