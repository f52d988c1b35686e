"""The arithmetic of the benchmarks' figures: bounds, counts of experts, arrivals."""

import importlib
import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from flax import nnx

from dsjax.cache import latent_bytes_per_token
from dsjax.config import EngineConfig
from dsjax.engine import Request
from dsjax.inference.sampling import Sampling
from dsjax.layers.linear import Linear
from dsjax.plan.figures import device_bytes
from tests import oracle
from tests.dsjax.engine.small_engine import MODEL_CONFIG, TOKENIZER, an_engine, the_model
from tests.small_models import oracle_weights

ROOT = Path(__file__).resolve().parent.parent
BATCH, TEXT = 4, 24
assert MODEL_CONFIG.moe is not None
MOE = MODEL_CONFIG.moe


@pytest.fixture
def script(monkeypatch):
    """Imports a file of scripts/."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


@pytest.fixture
def served(script):
    """An engine that has answered four prompts, its recorder, and the texts."""
    rng = np.random.default_rng(3)
    prompts = [tuple(rng.integers(0, 256, 9 + index).tolist()) for index in range(BATCH)]
    with an_engine(share_prefixes=False) as engine:
        recorder = script("recorded_steps").Recorder(engine)
        sampling = Sampling(max_tokens=TEXT, ignore_eos=True)
        found = engine.generate([Request(prompt, sampling) for prompt in prompts])
        texts = [(*p, *one.tokens) for p, one in zip(prompts, found, strict=True)]
        yield engine, recorder, texts


def test_experts_of_the_timed_steps_are_those_that_numpy_routes_to(served):
    _, recorder, texts = served
    steps = recorder.full_decodes(BATCH)
    assert len(steps) >= 8
    counted = recorder.experts_read(steps)
    longest = max(map(len, texts))
    tokens_BT = np.array([[*text, *[0] * (longest - len(text))] for text in texts])
    segments_BT = np.array([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
    model = the_model()
    _, routed = oracle.forward(oracle_weights(model), MODEL_CONFIG, tokens_BT, segments=segments_BT)
    rows = {text: row for row, text in enumerate(texts)}
    expected = [
        [
            len({e for s, _, at in step.decoding for e in indices[rows[tuple(s.tokens)], at]})
            for _, indices in routed
        ]
        for step in steps
    ]
    np.testing.assert_array_equal(counted, expected)
    assert counted.min() >= MOE.top_k
    # One sequence alone goes to just so many: the others of the row are padding.
    alone = [
        type(step)(step.begun, [one for one in step.decoding if one[1] == 0], 0) for step in steps
    ]
    assert (recorder.experts_read(alone) == MOE.top_k).all()


def test_decode_figures_follow_from_the_steps(served, script):
    _, recorder, _ = served
    figures = script("recorded_steps").decode_figures(recorder, the_model(), BATCH, 1e9, most=6)
    assert figures["steps"] == 6
    steps = recorder.full_decodes(BATCH)[:7]
    assert figures["seconds"] == pytest.approx((steps[6].begun - steps[0].begun) / 6)
    cached = np.mean([sum(at for _, _, at in step.decoding) for step in steps[:6]])
    assert figures["cached_a_sequence"] == pytest.approx(cached / BATCH)
    assert figures["bound_seconds"] == pytest.approx(sum(figures["bytes"].values()) / 1e9)
    assert figures["of_bound"] == pytest.approx(figures["bound_seconds"] / figures["seconds"])
    moe = MOE
    even = moe.num_experts * (1 - (1 - moe.top_k / moe.num_experts) ** BATCH)
    assert figures["distinct_if_even"] == pytest.approx(even)
    with pytest.raises(ValueError, match="0 steps in a row had 9 sequences"):
        script("recorded_steps").decode_figures(recorder, the_model(), 9, 1e9, most=6)


def test_the_bound_counts_bytes_as_by_hand(script):
    config, model = MODEL_CONFIG, the_model()
    found = script("recorded_steps").step_bytes(model, 3, 100, 5.5)
    attention, moe, wide = config.attention, MOE, config.hidden_dim
    heads, rank = attention.num_heads, attention.kv_lora_rank
    nope, rope = attention.qk_nope_head_dim, attention.qk_rope_head_dim
    value, query = attention.v_head_dim, attention.q_lora_rank
    assert query is not None
    of_attention = wide * query + query + query * heads * (nope + rope)
    of_attention += wide * (rank + rope) + rank + rank * heads * (nope + value)
    of_attention += heads * value * wide
    of_layer = of_attention + 2 * wide
    dense = 3 * wide * config.intermediate_dim
    sparse = wide * moe.num_experts + 3 * wide * moe.shared_intermediate_dim
    others = 2 * of_layer + dense + sparse + wide + wide * config.vocab_size
    assert found["other_weights"] == 4 * others  # of float32
    assert found["experts"] == pytest.approx(5.5 * 3 * wide * moe.intermediate_dim * 4)
    assert found["embedding"] == 3 * wide * 4
    assert found["latents"] == 100 * config.num_layers * (rank + rope) * 4
    # All tokens and experts: every weight once.
    whole = script("recorded_steps").step_bytes(model, config.vocab_size, 0, moe.num_experts)
    sizes = sum(v[...].size for _, v in nnx.to_flat_state(nnx.state(model)))
    assert sum(whole.values()) == pytest.approx(4 * sizes)


@pytest.mark.parametrize("recipe", ["int8", "fp8", "int4"])
def test_random_weights_in_fewer_bits_stand_for_numbers_of_one_size(script, recipe):
    """Else layers would drown what a token brings, and its experts be everybody's."""
    models = script("random_models")
    sizes = ["num_layers=2", "hidden_dim=256"]
    model = models.random_model("tiny", sizes, recipe=recipe)
    matrices = [module for _, module in nnx.iter_modules(model) if isinstance(module, Linear)]
    stored = [matrix for matrix in matrices if matrix.form is not None]
    assert len(stored) > 10
    for matrix in matrices:
        deviation = float(np.std(np.asarray(matrix.stored(), np.float32)))
        assert deviation == pytest.approx(0.02, rel=0.1)
    whole = device_bytes(nnx.state(models.random_model("tiny", sizes)))
    assert device_bytes(nnx.state(model)) < {"int4": 0.45}.get(recipe, 0.65) * whole


def test_arrivals_are_a_poisson_process(script):
    rng = np.random.default_rng(0)
    times = script("open_loop").arrivals(rng, 50.0, 200.0)
    assert (np.diff(times) > 0).all()
    assert 0 <= times.min() <= times.max() < 200
    assert abs(times.size - 10_000) < 4 * 100  # four standard deviations
    gaps = np.diff(times)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)  # as exponential ones have it


def test_lengths_are_log_normal_and_cut(script):
    lengths = script("open_loop").Lengths(600, 1.0, 4096)
    drawn = lengths.draw(np.random.default_rng(0), 100_000)
    assert np.median(drawn) == pytest.approx(600, rel=0.02)
    assert drawn.min() >= 1
    assert drawn.max() == 4096
    below = drawn[drawn < 4096]
    assert np.quantile(below, 0.1) == pytest.approx(600 * math.exp(-1.305), rel=0.05)
    assert str(lengths) == "log-normal, median 600, sigma 1, cut at 4096"


def test_figures_of_an_open_loop_count_its_window_alone(script):
    module = script("open_loop")
    asked = [
        module.Asked(0.5, [0.8, 1.5, 2.5]),  # came before the window; two of its tokens count
        module.Asked(1.0, [1.2, 1.3, 3.5]),  # its last token is past the end
        module.Asked(2.0, [3.2]),  # no token in time: it has waited for one second
        module.Asked(3.1, []),
    ]
    found = module.figures_of(asked, 1.0, 3.0)
    assert found["requests"] == 2
    assert found["without_a_token"] == 1
    assert found["tokens_per_second"] == pytest.approx(4 / 2)
    assert found["first_token_p50"] == pytest.approx((0.2 + 1.0) / 2)
    assert found["between_tokens_p50"] == pytest.approx(0.7)  # of 0.7, 1.0, 0.1


def test_an_open_loop_asks_when_it_is_due_and_ends_what_is_left(script):
    module = script("open_loop")
    due = [0.0, 0.02, 0.3, 0.35]
    with an_engine(warm_up=False) as engine:
        engine.generate([Request((1, 2, 3), Sampling(max_tokens=4, ignore_eos=True))])
        requests = [
            Request((1, 2, index), Sampling(max_tokens=60, ignore_eos=True)) for index in range(4)
        ]
        found = module.run_open_loop(engine, requests, due, 0.2, 0.3)
        assert engine.figures().num_running == 0
    assert found["requests"] == 2
    assert found["seconds"] > 0
    assert 0 <= found["device_waits"] <= 1
    assert 0 <= found["host_waits"] <= 1


@pytest.mark.parametrize("done", [True, False])
def test_a_device_waits_where_all_that_was_launched_is_done(script, done):
    array = SimpleNamespace(is_ready=lambda: done, is_deleted=lambda: False)
    launched = SimpleNamespace(tokens_M=array)
    chosen = SimpleNamespace(done=lambda: True, result=lambda: launched)
    runner = SimpleNamespace(read=lambda *_: None, choose=lambda *_: chosen)
    engine = SimpleNamespace(_runner=runner, _loop=SimpleNamespace(num_open=0))
    with script("open_loop").watched(engine) as samples:
        runner.choose()
        time.sleep(0.05)
        assert not samples  # nobody has asked for anything
        engine._loop.num_open = 1
        while len(samples) < 3:
            time.sleep(0.01)
    assert set(samples) == {done}
    assert runner.choose() is chosen


def test_capacity_is_what_is_allocated(script):
    sizes = EngineConfig(max_batch=4, page_size=8, chunks=((1, 16),))
    model = the_model()
    memory = 320 << 20
    found = script("cache_capacity").cache_capacity(model, TOKENIZER, sizes, memory)
    config = model.config
    latent = latent_bytes_per_token(config, 4)
    assert found["pool_bytes"] == found["cache_tokens"] * latent
    attention = config.attention
    widths = attention.qk_nope_head_dim + attention.qk_rope_head_dim + attention.v_head_dim
    each = config.num_layers * attention.num_heads * widths * 4
    assert found["per_head_bytes"] == found["per_head_tokens"] * each
    assert 0 <= found["pool_bytes"] - found["per_head_bytes"] < each
    assert found["ratio"] == pytest.approx(each / latent, rel=1e-3)
    assert found["pool_bytes"] + found["weight_bytes"] < 0.9 * memory
    with pytest.raises(ValueError, match="does not say what memory it has"):
        script("cache_capacity").cache_capacity(model, TOKENIZER, sizes)


def test_a_profile_says_what_ran_and_when_nothing_did(script):
    profiles = script("profiles")
    # Two that overlap, nothing for 30 us, then one; the last within it.
    spans = [
        ("a_1", 0, 10_000),
        ("a_2", 5_000, 15_000),
        ("b", 50_000, 20_000),
        ("a_1", 55_000, 1_000),
    ]
    kernels = [profiles.Kernel(name, "op", length, begin) for name, begin, length in spans]
    assert profiles.gaps(kernels) == [(30_000, "b")]
    text = profiles.summary(kernels, 2)
    assert text.startswith("0.02 ms of kernels a step, 2 launches; 0.01 ms without any\n")
    assert "    0.013  a\n" in text  # of all kernels a, whatever their number
    assert text.endswith("before what\n    0.015      0.5  b\n")
    assert profiles.gaps([profiles.Kernel("torch's", "", 1.0)]) == []


def test_steps_that_decode_are_profiled_as_they_are_served(script, tmp_path):
    """A CPU's profile has no kernels; that there is one says that it was begun and ended."""
    steps, recorded = script("benchmark_steps"), script("recorded_steps")
    with an_engine() as engine:
        recorder = recorded.Recorder(engine)
        requests = steps.random_requests(the_model(), 0, 2, 8, 40)
        steps.trace_decodes(engine, recorder, requests, str(tmp_path))
        engine.generate(requests)  # not begun again
    assert script("profiles").kernels_in(str(tmp_path)) == []


def test_a_prefill_and_a_long_prompt_have_their_figures(script, monkeypatch):
    steps, model = script("benchmark_steps"), the_model()
    make = steps.engine_of  # what is not needed is not compiled here
    monkeypatch.setattr(
        steps, "engine_of", lambda model, config: make(model, replace(config, warm_up=False))
    )
    found = steps.prefill(model, 2, 32, 1e12)
    assert found["steps"] >= 3
    assert found["tokens_per_second"] == pytest.approx(64 / found["seconds"])
    assert found["of_dense"] == pytest.approx(found["flops_per_second"] / 1e12)
    named = list(steps.long_prompt(model, 64, (32, 64), 4, 1, 1e9))
    assert [name for name, _ in named] == ["long", "long", "long ratio"]
    firsts = [figures["first_token"] for _, figures in named[:2]]
    assert named[2][1]["of_one_piece"] == pytest.approx(firsts[0] / firsts[1])


def test_without_transformers_the_peer_is_a_line(script, monkeypatch, capsys):
    steps = script("benchmark_steps")
    monkeypatch.setattr(steps, "missing", lambda: "torch")
    assert steps.in_own_processes(["peer"], ["bf16"])
    assert json.loads(capsys.readouterr().out)["skipped"] == "no torch here"


def test_sides_are_put_beside_each_other(script, monkeypatch, capsys):
    steps = script("benchmark_steps")
    monkeypatch.setattr(steps, "missing", lambda: None)
    monkeypatch.setattr(sys, "argv", ["benchmark_steps.py"])

    class Ran(SimpleNamespace):
        def __init__(self, command, **_):
            weights = command[command.index("--weights") + 1] if "ours" in command else "peer"
            speed = {"bf16": 30.0, "int8": 60.0, "peer": 10.0}[weights]
            line = {"measurement": "decode", "batch": 1, "length": 8, "tokens_per_second": speed}
            super().__init__(stdout=[json.dumps(line) + "\n"], returncode=0)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(subprocess, "Popen", Ran)
    assert steps.in_own_processes(["decode", "peer"], ["bf16", "int8"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()[-2:]]
    shape = {"measurement": "ratio", "of": "decode", "batch": 1, "length": 8}
    assert lines[0] == shape | {"side": "bf16", "to": "peer", "ratio": 3.0}
    assert lines[1] == shape | {"side": "int8", "to": "bf16", "ratio": 2.0}
