"""The engine over a mesh: devices that divide a batch have sequences and pages of their own."""

import math
from dataclasses import replace

import jax
import numpy as np
import pytest

from dsjax.config import MeshConfig
from dsjax.engine import Engine, Generation
from dsjax.inference.sampling import Sampling
from dsjax.mesh import inference_rules, make_mesh
from pallas_kernels.mla_decode import LatentPages
from tests.dsjax.engine.small_engine import (
    CONFIG,
    MODEL_CONFIG,
    TOKENIZER,
    an_engine,
    assert_greedy,
    random_requests,
    the_model,
)
from tests.small_models import random_model


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "pages"), [((1, 1, 4, 1, 2), 7), ((2, 1, 2, 1, 1), 12)])
def test_devices_with_pages_of_their_own_give_the_same_texts(mesh, pages):
    """Each has a part of the sequences and of the pool; heads and experts are divided too.

    Where heads are, a page has twice the tokens.
    """
    devices = jax.devices()[: math.prod(mesh)]
    rules = inference_rules(make_mesh(MeshConfig(*mesh), devices))
    model = random_model(MODEL_CONFIG, rules=rules)
    # Two sequences a device, and pages for little more than one.
    sizes = replace(CONFIG, max_batch=8, batch_sizes=None, num_pages=pages)
    requests = random_requests(50, 24)
    asked = Sampling(max_tokens=3, temperature=1.0, seed=3, logprobs=2, prompt_logprobs=1)
    drawn = random_requests(51, 8, asked)
    with Engine(model, TOKENIZER, sizes) as engine, an_engine() as alone:
        assert_greedy(requests, engine.generate(requests), the_model())
        figures = engine.figures()
        assert figures.num_pages == 4 * pages
        assert figures.pages_held == 0
        assert figures.preemptions > 0
        assert figures.shared_tokens > 0
        for got, want in zip(engine.generate(drawn), alone.generate(drawn), strict=True):
            assert got.tokens == want.tokens
            np.testing.assert_allclose(_numbers(got), _numbers(want), atol=1e-4)


def _numbers(generation: Generation) -> list[float]:
    """All log-probabilities of a generation, of its prompt's tokens first."""
    assert generation.prompt_logprobs is not None
    assert generation.logprobs is not None
    return [each.logprob for each in (*generation.prompt_logprobs, *generation.logprobs)]


def test_devices_with_pages_of_their_own_hold_as_many_times_the_tokens():
    """Compiled for 8 devices, none of which has more of the pool than one alone."""
    mesh = make_mesh(MeshConfig(fsdp=1, expert=8))
    model = random_model(MODEL_CONFIG, rules=inference_rules(mesh))
    with Engine(model, TOKENIZER, CONFIG) as engine, an_engine() as alone:
        pool, one = (_pages(each) for each in (engine, alone))
        assert pool.latent.sharding.shard_shape(pool.latent.shape) == one.latent.shape
        assert engine.figures().num_pages == 8 * alone.figures().num_pages


def _pages(engine: Engine) -> LatentPages:
    assert engine._runner._arrays is not None
    return engine._runner._arrays.pool.pages
