"""The engine over devices that divide heads, and the tokens of every page with them."""

import functools
import math
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from dsjax.config import MeshConfig, RuntimeConfig
from dsjax.configs.models import deepseek_v2_lite
from dsjax.engine import Engine, Generation, Request
from dsjax.engine.programs import RowShape
from dsjax.engine.runner import Runner
from dsjax.engine.sizes import computing_bytes, num_pages, page_bytes, page_tokens
from dsjax.engine.state import ChunkShape, Limits
from dsjax.inference.sampling import Sampling
from dsjax.kernels import choose_kernels
from dsjax.mesh import ShardingRules, inference_rules, make_mesh
from dsjax.model import DeepSeekV2, abstract_model, param_shardings
from dsjax.plan import count_collectives
from tests.dsjax.engine.small_engine import (
    CONFIG,
    MODEL_CONFIG,
    TOKENIZER,
    assert_greedy,
    compilations,
    random_requests,
)
from tests.small_models import random_model

FOUR_HEADS = replace(
    MODEL_CONFIG,
    vocab_size=260,  # which four devices divide
    attention=replace(MODEL_CONFIG.attention, num_heads=4),
)
ALONE = replace(CONFIG, chunks=((2, 8),))
FEW_PAGES = replace(ALONE, page_size=4, num_pages=7)
ASKED = Sampling(max_tokens=3, temperature=1.0, seed=3, logprobs=2, prompt_logprobs=1)


def rules_of(**axes: int) -> ShardingRules:
    mesh = MeshConfig(**({"fsdp": 1} | axes))
    return inference_rules(make_mesh(mesh, jax.devices()[: math.prod(axes.values())]))


@functools.cache
def the_model() -> DeepSeekV2:
    return random_model(FOUR_HEADS)


@pytest.fixture(scope="module")
def divided() -> Iterator[Engine]:
    """Over four devices, with its programs compiled."""
    model = random_model(FOUR_HEADS, rules=rules_of(tensor=4))
    with Engine(model, TOKENIZER, replace(FEW_PAGES, warm_up=True)) as engine:
        yield engine


def numbers(generation: Generation) -> Iterator[float]:
    """All log-probabilities of a generation, of its prompt's tokens first."""
    assert generation.prompt_logprobs is not None
    assert generation.logprobs is not None
    for each in (*generation.prompt_logprobs, *generation.logprobs):
        yield each.logprob
        yield from (logprob for _, logprob in each.best)


@pytest.mark.slow
def test_texts_are_those_of_one_device(divided):
    """Greedy and drawn, with shared prefixes and too few pages; nothing is compiled meanwhile.

    `test_engine_mesh` has such devices beside others that have sequences of their own.
    """
    requests, asked = random_requests(60, 24), random_requests(61, 8, ASKED)
    with compilations() as compiled:
        greedy = divided.generate(requests)
        drawn = divided.generate(asked)
    assert not compiled
    figures = divided.figures()
    assert figures.pages_held == 0
    assert figures.preemptions > 0
    assert figures.shared_tokens > 0
    assert_greedy(requests, greedy, the_model())
    with Engine(the_model(), TOKENIZER, ALONE) as alone:
        drawn_alone = alone.generate(asked)
    for got, want in zip(drawn, drawn_alone, strict=True):
        assert got.tokens == want.tokens
        np.testing.assert_allclose(list(numbers(got)), list(numbers(want)), atol=1e-4)


def test_four_devices_hold_four_times_the_tokens(divided):
    """None has more of the pool than one alone, so that a sequence may be four times as long."""
    request = Request(tuple(range(60)), Sampling(max_tokens=40))
    with Engine(the_model(), TOKENIZER, FEW_PAGES) as alone:
        for whole, one in zip(arrays_of(divided), arrays_of(alone), strict=True):
            assert whole.sharding.shard_shape(whole.shape) == one.shape
        assert (alone.max_length, divided.max_length) == (28, 4 * 28)
        assert alone.refusal(request) is not None
        assert divided.refusal(request) is None


def arrays_of(engine: Engine) -> list[jax.Array]:
    """The arrays of an engine's pool."""
    assert engine._runner._arrays is not None
    return jax.tree.leaves(engine._runner._arrays.pool)


def test_a_memory_of_a_size_has_room_for_as_many_times_the_tokens():
    """Of each device as many pages as of one, and each page has four times the tokens."""
    sizes = replace(ALONE, max_batch=8, batch_sizes=(8,), num_pages=None, memory_fraction=1.0)
    for model, tokens in (
        (the_model(), 8),
        (random_model(FOUR_HEADS, rules=rules_of(tensor=4)), 32),
    ):
        memory = computing_bytes(model, sizes) + 20 * page_bytes(the_model(), sizes)
        assert num_pages(model, sizes, (memory, 0)) == 20
        assert page_tokens(model, sizes) == tokens


def test_a_step_that_decodes_sends_no_latents(divided):
    """Of each layer queries and outputs; of the whole model the logits too."""
    text = divided._runner.program(RowShape(4, None, 4)).as_text()
    mesh = {"data": 1, "fsdp": 1, "expert": 1, "context": 1, "tensor": 4}
    uses = {kind.split()[0]: use for kind, use in count_collectives(text, mesh).items()}
    assert set(uses) == {"all-gather", "all-to-all", "all-reduce"}
    attention = FOUR_HEADS.attention
    heads, rank = attention.num_heads, attention.kv_lora_rank
    queries = 4 * heads * (rank + attention.qk_rope_head_dim) * 4
    logits = 4 * FOUR_HEADS.vocab_size * 4
    layers = FOUR_HEADS.num_layers
    assert uses["all-to-all"].bytes == layers * 4 * heads * (rank * 4 + 4) * 3 // 4
    assert uses["all-gather"].bytes == (layers * queries + logits) * 3 // 4


@pytest.mark.core  # what Mosaic takes changes with jax
def test_steps_on_two_gpus_lower_with_hoppers_kernels():
    """A layer with V2-Lite's sizes: sequences that decode, and a prompt's chunk beside them."""
    config = replace(deepseek_v2_lite.config, num_layers=1, num_dense_layers=0, vocab_size=1024)
    runtime = RuntimeConfig(param_dtype="bfloat16")
    rules = rules_of(tensor=2)
    card: Any = SimpleNamespace(platform="gpu", device_kind="NVIDIA H200")
    kernels = choose_kernels(card, config, runtime, rules)
    assert (kernels.mla_decode, kernels.mla_attention) == ("hopper", "hopper")
    graphdef, state = abstract_model(config, runtime, rules, kernels)
    state = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        state,
        param_shardings(state, rules),
    )
    sizes = replace(CONFIG, max_batch=16, batch_sizes=(16,), page_size=64)
    model = nnx.merge(graphdef, state)
    chunk = ChunkShape(1, 256)
    known = np.ones(config.vocab_size, bool)
    runner = Runner(model, sizes, Limits(16, 4096, (chunk,)), 64, known)
    function, static, arrays, _ = runner._to_compile(RowShape(16, chunk, 16))
    traced = jax.jit(functools.partial(function, *static)).trace(*arrays)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.all_to_all") == 1
    # Absorbed attention, expanded to a chunk's own tokens and to those before, three of experts.
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 6
