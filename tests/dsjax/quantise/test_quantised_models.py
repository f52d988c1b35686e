"""Models with quantised weights: what they compute, load, save and generate."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dsjax
from dsjax.cli import main
from dsjax.config import RECIPES, MeshConfig, QuantisationConfig, QuantisationRule, TrainConfig
from dsjax.mesh import inference_rules, make_mesh, train_rules
from dsjax.model import DeepSeekV2
from dsjax.weights import load_weights, save_weights
from tests.small_models import SMALL, random_model

TOKENS = jnp.arange(40, dtype=jnp.int32)[None] % SMALL.vocab_size
# Every form, in every kind of place; the embedding too.
MIXED = QuantisationConfig(
    (
        QuantisationRule("embed", "int8"),
        QuantisationRule(r".*\.wk_b", "fp8"),
        QuantisationRule(r".*\.wv_b", "int8"),
        QuantisationRule(r".*\.(wo|w_up)", "int4_g32_zero"),
        QuantisationRule(r".*\.w_down|lm_head", "fp8_block128"),
        QuantisationRule(".*", "int4_g64"),
    )
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantised") / "ours"
    save_weights(random_model(SMALL), path)
    return path


def arrays(model: DeepSeekV2) -> dict[str, np.ndarray]:
    flat = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): np.asarray(variable[...]) for path, variable in flat}


def assert_same(one: DeepSeekV2, other: DeepSeekV2) -> None:
    ours, theirs = arrays(one), arrays(other)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert array.dtype == theirs[name].dtype, name
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)


def widened(model: DeepSeekV2, folder: Path) -> DeepSeekV2:
    """A plain model with the numbers that a quantised one's stand for."""
    plain = load_weights(folder)
    for name, matrix in dict(plain.matrices()).items():
        other = dict(model.matrices())[name]
        if other.form is None:
            continue
        # One layer at a time, as a scan gives them.
        assert other.scales is not None
        zeros = None if other.zeros is None else other.zeros[...]
        leaves = (other.weight[...], other.scales[...], zeros)
        stacked = other.weight[...].ndim > len(other.sides.shape)

        def whole(leaves, other=other):
            parts = other.sides.as_matrix(other.form, *leaves)
            return other.sides.whole(parts.dequantised(jnp.float32))

        matrix.weight[...] = jax.vmap(whole)(leaves) if stacked else whole(leaves)
    return plain


@pytest.mark.parametrize("recipe", [*RECIPES, MIXED], ids=[*RECIPES, "mixed"])
def test_a_quantised_model_computes_with_the_numbers_it_stands_for(folder, recipe):
    model = load_weights(folder, quantize=recipe)
    want = widened(model, folder)(TOKENS)
    np.testing.assert_allclose(model(TOKENS), want, rtol=2e-4, atol=2e-4)
    plain = load_weights(folder)(TOKENS)
    assert np.linalg.norm(want - plain) > 1e-3 * np.linalg.norm(plain)  # it is quantised


def test_pieces_and_devices_give_the_same_numbers(folder, monkeypatch):
    whole = load_weights(folder, quantize=MIXED)
    monkeypatch.setattr("dsjax.weights.quantised._PIECE_WEIGHTS", 300)
    assert_same(load_weights(folder, quantize=MIXED), whole)
    mesh = make_mesh(MeshConfig(fsdp=1, expert=2, tensor=2), devices=jax.devices()[:4])
    rules = inference_rules(mesh)
    sharded = load_weights(folder, quantize="int8", rules=rules)
    assert_same(sharded, load_weights(folder, quantize="int8"))
    np.testing.assert_allclose(
        sharded(TOKENS), load_weights(folder, quantize="int8")(TOKENS), rtol=1e-4, atol=1e-4
    )


def test_a_border_between_shards_within_a_group_is_refused(folder):
    mesh = make_mesh(MeshConfig(fsdp=1, tensor=2), devices=jax.devices()[:2])
    with pytest.raises(ValueError, match=r"border between the 2 shards of .* lies inside a group"):
        load_weights(folder, quantize="int4", rules=inference_rules(mesh))
    mesh = make_mesh(MeshConfig(fsdp=2), devices=jax.devices()[:2])
    with pytest.raises(ValueError, match="would be gathered for each use"):
        load_weights(folder, quantize="int8", rules=train_rules(mesh))


def test_a_saved_model_is_read_as_it_is_and_not_quantised_twice(folder, tmp_path):
    model = load_weights(folder, quantize=MIXED)
    save_weights(model, tmp_path / "saved")
    assert_same(load_weights(tmp_path / "saved"), model)
    assert load_weights(tmp_path / "saved").options.runtime.quantisation == MIXED
    with pytest.raises(ValueError, match="saved: is quantised already"):
        load_weights(tmp_path / "saved", quantize="int8")
    with pytest.raises(ValueError, match="a quantised model is saved as it is"):
        save_weights(model, tmp_path / "other", dtype="bfloat16")


@pytest.mark.parametrize("recipe", RECIPES)
def test_text_is_generated(recipe, trained_run: TrainConfig, monkeypatch, capsys):
    arguments = ["--max-tokens", "6", "--dtype", "float32", "--quantize", recipe]
    run = ["dsjax", "generate", str(trained_run.directory), "--prompt", "1 + 2", *arguments]
    monkeypatch.setattr("sys.argv", run)
    with pytest.raises(SystemExit) as exit_:
        main()
    printed = capsys.readouterr().out
    assert not exit_.value.code
    model = dsjax.load(trained_run.directory, dtype="float32", quantize=recipe)
    assert model.options.runtime.quantisation == RECIPES[recipe]
    assert printed == model.generate("1 + 2", max_tokens=6) + "\n"
    # What decodes from the cache, in the absorbed form, is what the forward pass computes.
    assert model.tokenizer is not None
    ids = model.tokenizer.encode("1 + 2")
    new = model.generate(ids, max_tokens=6, details=True).tokens
    logits = model(jnp.asarray([[*ids, *new]], jnp.int32))[0]
    assert [int(token) for token in jnp.argmax(logits, -1)[len(ids) - 1 : -1]] == list(new)
