"""NaN and infinite weights are refused by name, unless they are asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import dsjax
from dsjax.weights import load_weights, save_weights
from dsjax.weights.finite import NonFiniteError, require_finite
from tests.hf_folders import convert_quietly, make_folder
from tests.small_models import SMALL, random_model

TENSOR = "model.layers.1.mlp.experts.2.up_proj.weight"
PARAM = "moe_layers.feed_forward.w_up.weight"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A Hugging Face folder and a checkpoint of ours, each with one value that is no number."""
    root = tmp_path_factory.mktemp("places")
    make_folder(root / "hf", SMALL, jnp.bfloat16, num_files=1)
    (root / "hf" / "tokenizer.json").unlink()  # not a real one
    (file,) = (root / "hf").glob("*.safetensors")
    tensors = safetensors.numpy.load_file(file)
    tensors[TENSOR][1, 2] = np.nan
    safetensors.numpy.save_file(tensors, file, {"format": "pt"})
    model = random_model(SMALL)
    assert model.moe_layers is not None
    weight = model.moe_layers.feed_forward.w_up.weight
    weight[...] = weight[...].at[1, 3, 0, 0].set(-jnp.inf)
    save_weights(model, root / "ours")  # nothing is lost of what a run came to
    return root


@pytest.mark.parametrize(
    ("place", "named"),
    [
        ("hf", rf"safetensors: tensor {TENSOR}: 1 NaN and 0 infinite"),
        ("ours", f"params: parameter {PARAM}: 0 NaN and 1 inf"),
    ],
)
def test_weights_that_are_no_numbers_are_named_and_given_where_asked_for(
    places, tmp_path, place, named
):
    other = tmp_path / "converted"
    for use in (load_weights, dsjax.load, lambda path: convert_quietly(path, other)):
        with pytest.raises(ValueError, match=rf"^[^\n]*{named}[^\n]*$"):
            use(places / place)
    assert not other.exists()
    convert_quietly(places / place, other, allow_nonfinite=True)
    for folder in (places / place, other):
        model = load_weights(folder, allow_nonfinite=True)
        finite = [bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(nnx.state(model))]
        assert finite.count(False) == 1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float32])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_every_value_that_is_no_number_is_found_wherever_it_is(dtype, value):
    extremes = np.zeros((2, 300_000), dtype)  # more than one block
    extremes[0, :4] = [jnp.finfo(dtype).max, jnp.finfo(dtype).min, jnp.finfo(dtype).tiny, -0.0]
    require_finite(extremes, "x")
    require_finite(extremes[:0], "x")
    for place in ((0, 0), (1, 299_999), (1, 5)):
        wrong = extremes.copy()
        wrong[place] = value
        with pytest.raises(NonFiniteError, match=r"x: . NaN and . infinite of the 600000 values"):
            require_finite(wrong, "x")
