"""What a recipe makes of a model, and what is said where it does not fit."""

import re

import pytest

from dsjax.config import QuantisationConfig, QuantisationRule, RuntimeConfig
from dsjax.config.load import load_recipe
from dsjax.config.quantisation import FORMATS, RECIPES
from dsjax.model import abstract_model
from dsjax.quantise import format_of
from dsjax.weights.stored_params import stored_params
from tests.small_models import SMALL


def recipe(*rules: tuple[str, str]) -> QuantisationConfig:
    return QuantisationConfig(tuple(QuantisationRule(*rule) for rule in rules))


@pytest.mark.core
@pytest.mark.parametrize("name", RECIPES)
def test_a_named_recipe_quantises_all_but_a_few_matrices(name: str):
    params = stored_params(SMALL, load_recipe(name))
    kept = {
        ".".join(path)
        for path, (shape, dtype) in params.leaves.items()
        if dtype is None and len(shape) > 1 and "norm" not in path[-2]
    }
    router = "moe_layers.feed_forward.router.gate.weight"
    assert kept == {"embed.weight", router} | ({"lm_head.weight"} if name == "fp8" else set())


@pytest.mark.core
def test_the_first_rule_that_matches_decides():
    rules = recipe((r"moe_layers\.feed_forward\.w_down", "int4_g32_zero"), ("embed|.*w_.*", "int8"))
    found = stored_params(SMALL, rules).matrices
    forms = {".".join(path): form for path, (_, form) in found.items()}
    assert forms["moe_layers.feed_forward.w_down"] == format_of("int4_g32_zero")
    assert forms["moe_layers.feed_forward.w_up"] == forms["embed"] == format_of("int8")
    assert "lm_head" not in forms


@pytest.mark.core
@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("lm_heed", "int8")], "quantisation.rules.weights='lm_heed': matches no matrix"),
        ([("lm_head", "int8"), ("embd", "bfloat16")], "'embd': matches no matrix"),
        ([("lm_head", "bfloat16")], "must quantise something"),
        ([("lm_head", "int3")], "quantisation.rules.format='int3': must be one of bfloat16, int8,"),
        ([("(", "int8")], "quantisation.rules.weights='(': no regular expression"),
        ([(".*wk_b", "int4_g64")], "wk_b cannot be int4_g64: it is contracted over two"),
        ([(".*wq_nope", "fp8_block128")], "wq_nope: quantisation: blocks of 128 columns"),
        ([(".*", "bfloat16"), ("lm_head", "int8")], "they leave every matrix of the model as it"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(rules, message: str):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        abstract_model(SMALL, RuntimeConfig(quantisation=recipe(*rules)))
    assert "\n" not in str(error.value)


@pytest.mark.core
def test_recipes_come_by_name_or_file(tmp_path):
    file = tmp_path / "mine.py"
    rules = '(QuantisationRule("lm_head", "int8"),)'
    head = "from dsjax.config import QuantisationConfig, QuantisationRule\n"
    file.write_text(f"{head}config = QuantisationConfig({rules})\n")
    assert load_recipe(file) == recipe(("lm_head", "int8"))
    with pytest.raises(ValueError, match="quantize='int3': must be one of int8, fp8, int4, or a"):
        load_recipe("int3")
    file.write_text("config = 3\n")
    with pytest.raises(ValueError, match=r"mine\.py: must bind `config` to a QuantisationConfig"):
        load_recipe(file)


@pytest.mark.core
def test_every_form_has_a_meaning():
    assert [name for name in FORMATS if format_of(name) is None] == ["bfloat16"]
