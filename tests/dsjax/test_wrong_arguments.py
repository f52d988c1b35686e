"""Python's API: what is no argument of ours is one line that names it, before anything is read."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsjax
from dsjax.api import LanguageModel
from dsjax.data.tokenizer import ByteTokenizer
from tests.small_models import SMALL, random_model


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    config = replace(SMALL, num_layers=2, vocab_size=258, max_length=100)
    return LanguageModel.of(random_model(config), ByteTokenizer(), Path("nowhere"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 8}, "max_new_tokens: no such option; did you mean max_tokens?"),
        ({"do_sample": True}, "do_sample: no such option; did you mean temperature, which draws"),
        ({"num_return_sequences": 2}, "did you mean n, in generate?"),
        ({"stop_token_ids": [3]}, "did you mean stop_tokens?"),
        ({"temprature": 1.0}, "did you mean temperature?"),
        ({"zzz": 1}, "zzz: no such option; there are max_tokens, "),
    ],
)
def test_an_unknown_option_of_generation_names_the_nearest(model, options, message: str):
    for call in (model.generate, model.stream):
        with pytest.raises(TypeError) as refused:
            call("a", **options)
        assert message in str(refused.value)


def test_no_seed_is_named_as_it_was_given(model):
    with pytest.raises(ValueError, match=r"seed=\[\]: must be 1 or more"):
        model.generate("a", seed=[])


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ("text", "not str"),
        ([[1, 2]], "not list"),
        (jnp.zeros(3, jnp.int32), "not int32 [3]"),
        (jnp.zeros((1, 3)), "not float32 [1, 3]"),
        (np.zeros((1, 3), np.bool_), "not bool [1, 3]"),
    ],
)
def test_a_model_is_called_with_whole_numbers_of_two_dims(model, tokens, message: str):
    with pytest.raises(TypeError) as refused:
        model(tokens)
    assert str(refused.value).startswith(
        "tokens: must be an array of whole numbers [batch, length]"
    )
    assert str(refused.value).endswith(message)


def test_a_call_with_no_token_is_refused_inside_jit_too(model):
    for shape in ((0, 3), (1, 0)):
        with pytest.raises(ValueError, match=r"tokens: shape .* holds none"):
            jax.eval_shape(model, jax.ShapeDtypeStruct(shape, jnp.int32))
    assert jax.eval_shape(model, jax.ShapeDtypeStruct((1, 2), jnp.int32)).shape == (1, 2, 258)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"mesh": {"tensor": 2}}, "mesh={'tensor': 2}: must be a jax.sharding.Mesh"),
        ({"kernels": "xla"}, "kernels='xla': must be a dsjax.config.KernelConfig or None"),
        ({"quantize": 4}, "quantize=4: must be int8, fp8, int4"),
        ({"path_or_hub_name": None}, "path_or_hub_name=None: must be a path or a name"),
    ],
)
def test_load_names_an_argument_of_another_kind(argument, message: str):
    with pytest.raises(TypeError) as refused:
        dsjax.load(**({"path_or_hub_name": "nowhere"} | argument))
    assert str(refused.value).startswith(message)


def test_load_says_what_a_place_is_that_is_no_model(tmp_path: Path):
    file = tmp_path / "model.safetensors"
    file.touch()
    for place, message in (
        (file, "is a file; a model is the folder that holds it"),
        ("", "path_or_hub_name='': must not be empty"),
        ("tiny", "tiny: is a config, which has no weights"),
    ):
        with pytest.raises(ValueError, match=message):
            dsjax.load(place)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="dtype='fp32': must be float32 or bfloat16"):
        dsjax.weights.load_weights(tmp_path / "empty", dtype="fp32")


def test_save_and_train_name_an_argument_of_another_kind(model, tmp_path: Path):
    with pytest.raises(TypeError, match="model='x': must be a model of ours"):
        dsjax.save("x", tmp_path / "new")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="path=3: must be a path"):
        dsjax.save(model, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="path='': must not be empty"):
        dsjax.save(model, "")
    with pytest.raises(TypeError, match="overrides='num_steps=3': must be a list"):
        dsjax.train("quickstart", "num_steps=3")
    with pytest.raises(TypeError, match="config=3: must be a config, its name or its file"):
        dsjax.train(3)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_what_is_printed_fits_a_screen(model):
    assert str(model) == repr(model)
    assert len(str(model)) < 200
    assert repr(model.tokenizer) == "ByteTokenizer('bytes', 258 tokens)"
