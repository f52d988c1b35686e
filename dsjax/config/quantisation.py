"""Which weights a model keeps in fewer bits, and in what form: a recipe."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dsjax.config.fitting import checked
from dsjax.config.model import require

# Names of the forms that weights are stored in; `dsjax.quantise` says what they are. "bfloat16"
# leaves weights as they are.
INT4_GROUPS = (32, 64, 128)
FORMATS = (
    "bfloat16",
    "int8",
    "fp8",
    "fp8_block128",
    *(f"int4_g{group}{zero}" for zero in ("", "_zero") for group in INT4_GROUPS),
)
# What a file of other software may bring: blocks that a joined tensor's parts cut through.
STORED_FORMATS = (*FORMATS, "fp8_row128")


@checked
@dataclass(frozen=True)
class QuantisationRule:
    """One line of a recipe.

    Attributes:
        weights: regular expression; it must match the whole name of a matrix, such as
            "moe_layers.feed_forward.w_gate", "lm_head" or "embed".
        format: the form that these are stored in, one of `FORMATS`.
    """

    weights: str
    format: str

    def __post_init__(self) -> None:
        try:
            re.compile(self.weights)
        except re.error as error:
            raise ValueError(
                f"quantisation.rules.weights={self.weights!r}: no regular expression: {error}"
            ) from None
        require(
            self.format in STORED_FORMATS,
            "quantisation.rules.format",
            self.format,
            f"must be one of {', '.join(FORMATS)}",
        )


@checked
@dataclass(frozen=True)
class QuantisationConfig:
    """A recipe: of each matrix the first rule that matches its name decides; others stay.

    Attributes:
        rules: the rules, in order. Each must match a matrix of the model.
    """

    rules: tuple[QuantisationRule, ...]

    def __post_init__(self) -> None:
        quantising = [rule for rule in self.rules if rule.format != "bfloat16"]
        require(bool(quantising), "quantisation.rules", self.rules, "must quantise something")


def _recipe(*rules: tuple[str, str]) -> QuantisationConfig:
    return QuantisationConfig(tuple(QuantisationRule(*rule) for rule in rules))


# Each first rule matches in a model without experts too. The router stays as it is: a token that
# goes to another expert costs more than its few bytes spare.
RECIPES = {
    "int8": _recipe((r"embed|.*\.router\.gate", "bfloat16"), (r".*", "int8")),
    # The parts of joined tensors have a scale for each column: V3's blocks would cut across them.
    "fp8": _recipe(
        (r"embed|lm_head|.*\.router\.gate", "bfloat16"),
        (r".*\.(wq_nope|wq_rope|wk_b|wv_b)", "fp8"),
        (r".*", "fp8_block128"),
    ),
    "int4": _recipe(
        (r"embed|.*\.router\.gate", "bfloat16"),
        (r"lm_head|.*\.(wq_a|wkv_a|wk_b|wv_b)", "int8"),
        (r".*", "int4_g64"),
    ),
}
