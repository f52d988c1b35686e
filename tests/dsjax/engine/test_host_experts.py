"""Experts in the host's memory: the cache's rule, bytes and back, the same text as without."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import SingleDeviceSharding
from typer.testing import CliRunner

from dsjax.api import load
from dsjax.cli import app
from dsjax.config import QuantisationConfig, QuantisationRule
from dsjax.config.engine import memory_bytes
from dsjax.config.quantisation import RECIPES
from dsjax.engine import Engine
from dsjax.engine.expert_cache import ExpertCache
from dsjax.inference.sampling import Sampling
from dsjax.layers.moe.packed import ExpertLayout
from dsjax.mesh import ShardingRules
from dsjax.model import DeepSeekV2
from dsjax.weights import save_weights
from dsjax.weights.host_experts import (
    ExpertTraffic,
    HostExperts,
    host_experts_of,
    is_routed,
    must_leave_device,
    stored_bytes,
    take_experts,
)
from tests.dsjax.engine.small_engine import CONFIG, MODEL_CONFIG, TOKENIZER, random_requests
from tests.small_models import RUNTIME, SMALL_MOE, random_model

WIDE = replace(MODEL_CONFIG, num_layers=3, moe=replace(SMALL_MOE, num_experts=16))
ODD = QuantisationConfig((QuantisationRule(r".*\.w_(gate|up|down)", "int4_g32_zero"),))


def a_cache(capacity: int) -> tuple[ExpertCache[str, str], ExpertTraffic]:
    traffic = ExpertTraffic()
    return ExpertCache(capacity, lambda keys: [key.upper() for key in keys], 10, traffic), traffic


def test_the_least_recently_used_expert_goes():
    cache, traffic = a_cache(3)
    assert cache.take("abc") == ["A", "B", "C"]
    assert cache.take("a") == ["A"]
    cache.take("d")
    assert "b" not in cache
    assert all(key in cache for key in "acd")
    assert (traffic.wanted, traffic.hits, traffic.copied, traffic.copied_bytes) == (5, 1, 4, 40)


def test_more_experts_than_there_is_room_for_are_given_all_the_same():
    cache, traffic = a_cache(2)
    assert cache.take("abcd") == ["A", "B", "C", "D"]
    assert len(cache) == 2
    # Those that are there are found before others drive them out.
    assert cache.take("bcd") == ["B", "C", "D"]
    assert traffic.hits == 2
    nothing, traffic = a_cache(0)
    assert nothing.take("aa"[:1]) == ["A"]
    nothing.foresee("b", 1)
    assert traffic.copied == 1


def test_a_prompt_drives_out_nothing():
    cache, _ = a_cache(3)
    cache.take("ab")
    assert cache.take("cdef", passing=True) == ["C", "D", "E", "F"]
    assert all(key in cache for key in "abc")  # there was room for one
    cache.take("a", passing=True)
    cache.take("d")
    assert "a" not in cache  # passing by is no use


def test_what_is_foreseen_is_there_when_it_is_wanted():
    cache, traffic = a_cache(4)
    cache.take("abcd")
    cache.foresee("aef", 3)  # at most half of what is kept: a and e
    assert "e" in cache
    assert "f" not in cache
    assert "b" not in cache  # the longest unused, as a was renewed
    cache.take("ea")
    assert (traffic.hits, traffic.foreseen, traffic.guessed, traffic.copied) == (2, 1, 1, 5)
    cache.foresee("ebz", 0)
    assert "b" not in cache


def quantised_model(recipe: QuantisationConfig | None) -> DeepSeekV2:
    """A random model, its matrices in fewer bits."""
    model = random_model(WIDE)
    if recipe is None:
        return model
    model.options = replace(model.options, runtime=replace(RUNTIME, quantisation=recipe))
    model._quantise(recipe)
    return model


@pytest.mark.parametrize("recipe", [None, RECIPES["int8"], RECIPES["fp8"], RECIPES["int4"], ODD])
def test_an_expert_comes_back_from_its_bytes(recipe):
    model = quantised_model(recipe)
    experts = experts_of(take_experts(model))
    assert model.moe_layers is not None
    graphdef, state = nnx.split(model.moe_layers)
    layer = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[1], state)).feed_forward
    chosen, here = [5, 0, 15], SingleDeviceSharding(jax.devices()[0])
    found = jax.jit(ExpertLayout.unpack, static_argnums=0)(
        experts.layout, [jax.device_put(experts.packed[1][i], here) for i in chosen]
    )
    for name in ("gate", "up", "down"):
        want = getattr(layer, f"w_{name}").divided()
        some = jax.tree.map(lambda leaf: np.asarray(leaf)[np.array(chosen)], want)
        jax.tree.map(np.testing.assert_array_equal, getattr(found, name), some)
    assert experts.packed[0][0].sharding.memory_kind == "pinned_host"


def experts_of(model: DeepSeekV2) -> HostExperts:
    """The experts that a model has in the host's memory."""
    experts = host_experts_of(model)
    assert experts is not None
    return experts


def answers(model: DeepSeekV2, **changes) -> tuple[list, list]:
    """Texts of random requests, prompts in chunks beside decoding; and their log-probabilities."""
    sampling = Sampling(logprobs=3)
    requests = random_requests(3, 7, sampling, longest=40, most=12)
    with Engine(model, TOKENIZER, replace(CONFIG, **changes)) as engine:
        found = engine.generate(requests)
    assert all(one.finish == "length" for one in found)
    logprobs = [[token.logprob for token in one.logprobs or ()] for one in found]
    return [one.tokens for one in found], logprobs


@pytest.mark.parametrize("recipe", [None, RECIPES["int4"]], ids=["plain", "int4"])
def test_texts_are_those_of_a_model_that_has_its_experts(recipe):
    model = quantised_model(recipe)
    want, want_logprobs = answers(model)
    taken = take_experts(model)
    found, logprobs = answers(taken)
    assert found == want
    for one, other in zip(logprobs, want_logprobs, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)
    traffic = experts_of(taken).traffic
    assert traffic.copied == 32  # each once: the device keeps all
    assert traffic.hits > traffic.copied
    assert "were on the device" in str(traffic)


def test_few_kept_experts_give_the_same_and_cost_copies():
    model = random_model(WIDE)
    want, _ = answers(model)
    for capacity in (0, 5):
        taken = take_experts(model)
        experts = experts_of(taken)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dsjax.engine.runner.expert_capacity", lambda *_, c=capacity: c)
            found, _ = answers(taken)
        assert found == want
        assert experts.traffic.copied > 32


def test_nothing_is_compiled_after_the_start():
    taken = take_experts(random_model(WIDE))
    requests = random_requests(5, 3, longest=20, most=6)
    config = replace(CONFIG, chunks=((1, 16),), warm_up=True)
    with Engine(taken, TOKENIZER, config) as engine, pytest.MonkeyPatch.context() as patch:
        patch.setattr("dsjax.engine.host_reader.compiled", None)
        assert {one.finish for one in engine.generate(requests)} == {"length"}


def test_what_leaves_the_device_follows_from_its_memory():
    _, state = nnx.split(random_model(WIDE))
    one, rest = np.dtype(np.int8), 0
    for path, variable in nnx.to_flat_state(state):
        rest += 0 if is_routed(tuple(map(str, path))) else variable.size
    total = sum(leaf.size for leaf in jax.tree.leaves(state))

    def leaves(memory: int) -> bool:
        return must_leave_device(state, lambda _: one, memory, ShardingRules())

    assert not leaves(total * 5 // 4 + 2)
    assert leaves(total * 5 // 4 - 2)
    assert leaves(rest * 5 // 4 + 2)
    with pytest.raises(ValueError, match=f"without routed experts take {rest:,} bytes"):
        leaves(rest * 5 // 4 - 2)
    with pytest.raises(ValueError, match="device_memory='16 quarts': must be a size such as 16GiB"):
        memory_bytes("16 quarts")
    assert memory_bytes("16GiB") == memory_bytes(16 * 2**30) == 17179869184
    assert memory_bytes("1.5 gb") == 1500000000


def test_a_folder_is_loaded_under_a_cap(trained_run, monkeypatch, tmp_path):
    folder = trained_run.directory
    whole = load(folder, dtype="float32", quantize="int4")
    leaves = jax.tree.leaves(nnx.state(whole))
    total = sum(stored_bytes(leaf.shape, leaf.dtype) for leaf in leaves)
    cap = total * 6 // 5  # all but a few experts would fit
    want = whole.generate("1 + 2", max_tokens=6)
    roomy = load(folder, dtype="float32", quantize="int4", device_memory="8GiB")
    assert host_experts_of(roomy) is None  # all of it fits

    model = load(folder, dtype="float32", quantize="int4", device_memory=cap)
    with pytest.raises(ValueError, match="what is left does not hold one sequence"):
        model.generate("1 + 2")  # a step computes with more than these few bytes
    with pytest.raises(ValueError, match="its experts are in the host's memory"):
        model(jnp.zeros((1, 2), jnp.int32))
    with pytest.raises(ValueError, match="its experts are in the host's memory"):
        save_weights(model, tmp_path / "saved")

    monkeypatch.setattr("dsjax.weights.host_experts._SHARE_OF_WEIGHTS", 0.95 * total / 7.9e9)
    arguments = ["--prompt", "1 + 2", "--max-tokens", "6", "--dtype", "float32"]
    cut = [*arguments, "--quantize", "int4", "--device-memory", "7.9GB"]
    found = CliRunner().invoke(app, ["generate", str(folder), *cut])
    assert (found.stdout, found.exit_code) == (want + "\n", 0), found.stderr
    assert re.search(r"experts: [\d,]+ wanted, .*% were on the device", found.stderr)


def test_a_copy_of_the_model_says_that_it_has_no_experts():
    taken = take_experts(random_model(WIDE))
    copy = nnx.merge(*nnx.split(taken))
    with pytest.raises(ValueError, match="experts are in the host's memory, and this is a copy"):
        Engine(copy, TOKENIZER, CONFIG)
    with (
        Engine(taken, TOKENIZER, CONFIG) as engine,
        pytest.raises(ValueError, match="not replaced"),
    ):
        engine.update_weights(taken)
