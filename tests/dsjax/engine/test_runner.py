"""Which programs the device's side of the engine runs."""

import functools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import SingleDeviceSharding

from dsjax.config import EngineConfig, RuntimeConfig
from dsjax.configs.models import deepseek_v2_lite
from dsjax.engine import Request
from dsjax.engine.programs import RowShape
from dsjax.engine.runner import Runner
from dsjax.engine.shapes import Shapes
from dsjax.engine.state import ChunkShape, Limits
from dsjax.inference.sampling import Sampling
from dsjax.kernels import choose_kernels
from dsjax.model import abstract_model
from tests.dsjax.engine.small_engine import an_engine

HOPPER: Any = SimpleNamespace(platform="gpu", device_kind="NVIDIA H200")


def test_what_begins_a_prompt_attends_to_nothing_cached(monkeypatch):
    """A program for it has no loop over cached keys, which a GPU's host would have to wait for."""
    with an_engine() as engine:
        runner = engine._runner
        # As where all are compiled first.
        runner.shapes = replace(runner.shapes, first_chunks=runner.shapes.chunks)
        shapes, program = [], runner.program

        def note(key):
            if isinstance(key, RowShape) and key.chunk is not None:
                shapes.append(key)
            return program(key)

        monkeypatch.setattr(runner, "program", note)
        request = Request(tuple(range(40)), Sampling(max_tokens=1))
        (alone,) = engine.generate([request])
        assert [shape.is_first for shape in shapes] == [True, False, False]
        shapes.clear()
        assert engine.generate([request]) == [alone]  # what is shared is attended to
        assert [shape.is_first for shape in shapes] == [False]


@pytest.mark.core  # what Mosaic takes changes with jax
def test_a_turn_of_a_conversation_expands_nothing_that_is_cached():
    """Its few tokens attend in the latent space, in one program wherever they begin."""
    config = replace(deepseek_v2_lite.config, num_layers=1, num_dense_layers=1, vocab_size=1024)
    runtime = RuntimeConfig(param_dtype="bfloat16")
    kernels = choose_kernels(HOPPER, config, runtime)
    model = nnx.merge(*abstract_model(config, runtime, None, kernels))
    place = SingleDeviceSharding(jax.devices()[0])
    state = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), nnx.state(model)
    )
    nnx.update(model, state)
    sizes = EngineConfig(max_batch=16, batch_sizes=(16,))
    short, other = (ChunkShape(*chunk) for chunk in sizes.chunk_shapes()[:2])
    known = np.ones(config.vocab_size, bool)
    runner = Runner(model, sizes, Limits(16, 4096, (short, other)), 64, known)
    assert runner.shapes.first_chunks == (other,)
    loops = {}
    for chunk in (short, other):
        function, static, arrays, _ = runner._to_compile(RowShape(16, chunk, 16))
        traced = jax.jit(functools.partial(function, *static)).trace(*arrays)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        loops[chunk] = text.count("stablehlo.while")
    assert loops[short] == loops[other] - 1


def test_programs_for_few_sequences_are_for_short_chunks_alone():
    chunks = (ChunkShape(1, 2), ChunkShape(2, 8))
    shapes = Shapes((1, 4), 4, chunks).rows()
    beside = {chunk: {s.num_decoding for s in shapes if s.chunk == chunk} for chunk in chunks}
    assert beside == {chunks[0]: {1, 4}, chunks[1]: {4}}
