"""The table between Hugging Face tensors and our parameters."""

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flax import nnx

from dsjax.config import ModelConfig
from dsjax.families import from_hf_config, hf_table, hf_tensor_shapes
from dsjax.families.strided_copy import copy_strided
from dsjax.families.tensors import params_from_hf, params_to_hf
from dsjax.model import abstract_model
from tests.released_models import SIZES
from tests.small_models import SMALL, SMALL_LITE, SMALL_MOE

DENSE = replace(SMALL, moe=None, num_dense_layers=SMALL.num_layers)
NO_SHARED = replace(SMALL, moe=replace(SMALL_MOE, num_shared_experts=0), num_dense_layers=0)


def random_tensors(config: ModelConfig, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A checkpoint of a small model."""
    return {
        name: rng.standard_normal(shape).astype(np.float32)
        for name, shape in hf_tensor_shapes(config).items()
    }


def assert_fits_the_model(config: ModelConfig) -> None:
    """The table's parameters are those of the model, name by name and shape by shape."""
    _, state = abstract_model(config)
    expected = {tuple(map(str, path)): v.shape for path, v in nnx.to_flat_state(state)}
    table = hf_table(config)
    assert {path: param.shape for path, param in table.params.items()} == expected
    in_tensors = sum(math.prod(tensor.shape) for tensor in table.tensors.values())
    assert in_tensors == sum(math.prod(shape) for shape in expected.values())


@pytest.mark.core
@pytest.mark.parametrize("name", SIZES)
def test_released_models_are_covered_completely(repository, name):
    text = (repository / "tests" / "hf_configs" / f"{name}.json").read_text()
    config = from_hf_config(json.loads(text))
    shapes = hf_tensor_shapes(config)
    assert len(shapes) == SIZES[name].hf_tensors
    assert sum(map(math.prod, shapes.values())) == SIZES[name].parameters
    assert_fits_the_model(config)


@pytest.mark.core
@pytest.mark.parametrize("config", [SMALL, SMALL_LITE, DENSE, NO_SHARED])
def test_small_models_are_covered_and_come_back_bit_by_bit(config, rng):
    assert_fits_the_model(config)
    tensors = random_tensors(config, rng)
    back = dict(
        params_to_hf(hf_table(config), params_from_hf(hf_table(config), tensors.__getitem__))
    )
    assert back.keys() == tensors.keys()
    for name, values in tensors.items():
        np.testing.assert_array_equal(back[name], values, err_msg=name)


@pytest.mark.core
def test_every_kind_of_tensor_lands_where_the_attention_reads_it(rng):
    tensors = random_tensors(SMALL, rng)
    params = params_from_hf(hf_table(SMALL), tensors.__getitem__)
    size, heads = SMALL.attention, SMALL.attention.num_heads
    nope, rope, value = size.qk_nope_head_dim, size.qk_rope_head_dim, size.v_head_dim
    layer, stacked = 2, 1  # the third layer is the second with experts
    prefix = f"model.layers.{layer}."
    attention = {name: part["weight"] for name, part in params["moe_layers"]["attention"].items()}

    q_b = tensors[f"{prefix}self_attn.q_b_proj.weight"]
    kv_b = tensors[f"{prefix}self_attn.kv_b_proj.weight"]
    o = tensors[f"{prefix}self_attn.o_proj.weight"]
    for head in range(heads):
        rows = q_b[head * (nope + rope) :][: nope + rope]
        np.testing.assert_array_equal(attention["wq_nope"][stacked, :, head], rows[:nope].T)
        np.testing.assert_array_equal(attention["wq_rope"][stacked, :, head], rows[nope:].T)
        rows = kv_b[head * (nope + value) :][: nope + value]
        np.testing.assert_array_equal(attention["wk_b"][stacked, :, head], rows[:nope].T)
        np.testing.assert_array_equal(attention["wv_b"][stacked, :, head], rows[nope:].T)
        columns = o[:, head * value :][:, :value]
        np.testing.assert_array_equal(attention["wo"][stacked, head], columns.T)

    feed_forward = params["moe_layers"]["feed_forward"]
    for expert in (0, 5):
        down = tensors[f"{prefix}mlp.experts.{expert}.down_proj.weight"]
        np.testing.assert_array_equal(feed_forward["w_down"]["weight"][stacked, expert], down.T)
    router = tensors[f"{prefix}mlp.gate.weight"]
    np.testing.assert_array_equal(feed_forward["router"]["gate"]["weight"][stacked], router.T)
    shared = tensors[f"{prefix}mlp.shared_experts.up_proj.weight"]
    np.testing.assert_array_equal(feed_forward["shared"]["w_up"]["weight"][stacked], shared.T)
    dense = tensors["model.layers.0.mlp.gate_proj.weight"]
    np.testing.assert_array_equal(
        params["dense_layers"]["feed_forward"]["w_gate"]["weight"][0], dense.T
    )
    norm = tensors[f"{prefix}post_attention_layernorm.weight"]
    np.testing.assert_array_equal(params["moe_layers"]["feed_forward_norm"]["weight"][1], norm)
    np.testing.assert_array_equal(params["embed"]["weight"], tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["lm_head"]["weight"], tensors["lm_head.weight"].T)


def test_windows_read_only_the_rows_they_lie_in(rng):
    tensors = random_tensors(SMALL, rng)
    whole = params_from_hf(hf_table(SMALL), tensors.__getitem__)
    read_numbers = 0

    def read(name: str, start: int, stop: int) -> np.ndarray:
        nonlocal read_numbers
        read_numbers += stop - start
        return tensors[name].reshape(-1)[start:stop]

    for path, param in hf_table(SMALL).params.items():
        window = tuple(
            slice(start, int(rng.integers(start + 1, size + 1)))
            for size in param.shape
            for start in [int(rng.integers(size))]
        )
        node: Any = whole
        for key in path:
            node = node[key]
        np.testing.assert_array_equal(param.read(window, read), node[window], err_msg=str(path))
    half = hf_table(SMALL).params["embed", "weight"]
    read_numbers = 0
    half.read((slice(8, 16), slice(0, 4)), read)
    assert read_numbers == 8 * SMALL.hidden_dim


def test_all_unmatched_names_come_in_one_error():
    names = set(hf_tensor_shapes(SMALL))
    table = hf_table(SMALL)
    known = names | {"model.layers.1.self_attn.rotary_emb.inv_freq"}
    table.check_names(dict.fromkeys(known, ""), "folder")
    missing = {"lm_head.weight", "model.layers.2.mlp.experts.7.up_proj.weight"}
    unknown = {"model.layers.3.input_layernorm.weight", "model.layers.0.mlp.gate_proj.bias"}
    with pytest.raises(ValueError, match=r"^folder: 2 tensors are missing: .*; 2 tensors") as info:
        table.check_names(dict.fromkeys((names - missing) | unknown, ""), "folder")
    assert all(name in str(info.value) for name in missing | unknown)
    assert "\n" not in str(info.value)


def test_only_what_follows_from_the_config_is_ignored():
    is_ignored = hf_table(SMALL).is_ignored
    assert is_ignored("model.layers.11.self_attn.rotary_emb.inv_freq")
    assert not is_ignored("model.layers.11.self_attn.rotary_emb.inv_freq.weight")
    assert not is_ignored("model.layers.11.self_attn.q_proj.weight")


def test_a_misshapen_tensor_is_named(rng):
    tensors = random_tensors(SMALL, rng)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].T
    with pytest.raises(ValueError, match=r"lm_head.weight: shape \(32, 48\) must be \(48, 32\)"):
        params_from_hf(hf_table(SMALL), tensors.__getitem__)


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0), (2, 1, 0), (0, 2, 1)])
def test_strided_copies_are_exact(rng, dtype, order):
    source = rng.integers(0, 60_000, (5, 70, 131)).astype(dtype)[:, 3:, :]
    target = np.zeros([source.shape[axis] for axis in order], dtype)
    copy_strided(target, source.transpose(order))
    np.testing.assert_array_equal(target, source.transpose(order))
    back = np.zeros(source.shape, dtype)
    copy_strided(back.transpose(order), target)
    np.testing.assert_array_equal(back, source)
