"""Latents that the cache keeps in 8 bits: against a forward pass whose latents are rounded so."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax import load, save
from dsjax.cache import latent_bytes_per_token
from dsjax.config import EngineConfig, RuntimeConfig
from dsjax.config.runtime import LATENT_DTYPES, LatentDType
from dsjax.configs.models import deepseek_v2_lite
from dsjax.engine import Engine
from dsjax.engine.compiled import forget_programs
from dsjax.engine.fit import fit
from dsjax.engine.sizes import page_bytes
from dsjax.kernels import choose_kernels
from dsjax.layers.attention import MLA
from dsjax.mesh import ShardingRules
from dsjax.model import DeepSeekV2
from dsjax.weights import load_weights
from tests.dsjax.engine.small_engine import (
    CONFIG,
    MODEL_CONFIG,
    TOKENIZER,
    assert_greedy,
    random_requests,
)
from tests.dsjax.layers.test_divided_attention import SIZES, read, rules_of
from tests.dsjax.sequences import Sequences
from tests.dsjax.test_extend import LENGTH, MODELS, assert_close
from tests.small_models import RUNTIME, random_model


def a_model(config: Any, latent_dtype: LatentDType | None) -> DeepSeekV2:
    return random_model(config, runtime=replace(RUNTIME, latent_dtype=latent_dtype))


def rounded(latent: Any, latent_dtype: str) -> Any:
    """Each token's numbers in steps of a part of its largest one."""
    largest = {"int8": 127.0, "fp8": 448.0}[latent_dtype]
    step = jnp.abs(latent).max(axis=-1, keepdims=True) / largest
    if latent_dtype == "int8":
        return jnp.round(latent / step) * step
    return (latent / step).astype(jnp.float8_e4m3fn).astype(latent.dtype) * step


@pytest.fixture(params=LATENT_DTYPES)
def latent_dtype(request, monkeypatch) -> LatentDType:
    """One of the types; a model's own forward pass rounds its latents to it meanwhile."""
    exact = MLA.__call__, MLA._latents

    def forward(self: MLA, *arguments: Any) -> Any:
        def latents(mla: MLA, *given: Any) -> Any:
            latent, k_rope = exact[1](mla, *given)
            return rounded(latent, request.param), k_rope

        with monkeypatch.context() as patch:
            patch.setattr(MLA, "_latents", latents)
            return exact[0](self, *arguments)

    monkeypatch.setattr(MLA, "__call__", forward)
    return request.param


@pytest.mark.core
@pytest.mark.parametrize("name", MODELS)
def test_every_form_reads_what_the_cache_has_rounded(latent_dtype, name):
    """From nothing, token by token, a short part and a long one, over page borders."""
    model = a_model(MODELS[name], latent_dtype)
    tokens = np.random.default_rng(5).integers(0, 250, (2, LENGTH)).astype(np.int32)
    want = np.asarray(jax.jit(lambda model, tokens: model(tokens))(model, tokens))
    sequences = Sequences(model, 2, LENGTH)
    assert sequences.pool.pages.latent.dtype == LATENT_DTYPES[latent_dtype]
    for size in (13, 1, 3, 16, 1, 5):
        starts = sequences.lengths.copy()
        logits = sequences.step(tokens, [size, size], is_first=not starts.any())
        for row in range(2):
            assert_close(logits[row], want[row, starts[row] : starts[row] + size])


def test_a_text_is_the_same_whatever_runs_beside_it(latent_dtype):
    """In chunks, with shared prefixes and sequences that go on later."""
    model = a_model(MODEL_CONFIG, latent_dtype)
    requests = random_requests(7, 16)
    few = Engine(model, TOKENIZER, replace(CONFIG, num_pages=20))
    found = few.generate(requests)
    assert few.figures().preemptions > 0
    assert_greedy(requests, found, model)
    many = Engine(model, TOKENIZER, replace(CONFIG, num_pages=120))
    for _ in range(2):
        again = many.generate(requests)
        assert [one.tokens for one in again] == [one.tokens for one in found]
    assert many.figures().shared_tokens > 0


def test_devices_divide_scales_as_they_divide_tokens():
    alone = read(ShardingRules(), "float32", SIZES, "int8")
    divided = read(rules_of(tensor=4), "float32", SIZES, "int8")
    for got, want in zip(divided, alone, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


def test_the_same_memory_holds_nearly_twice_the_tokens():
    config = deepseek_v2_lite.config
    full = latent_bytes_per_token(config)
    found = fit(config, None, None, latent_dtype="int8").latents_per_token
    assert found == config.num_layers * (512 + 4 + 2 * 64)
    assert found == 17_388  # as the change log and the benchmarks say
    assert full / found > 1.78
    kept: dict[LatentDType | None, int] = {"int8": 1, None: 4}
    for dtype, itemsize in kept.items():
        page = page_bytes(a_model(MODEL_CONFIG, dtype), EngineConfig(page_size=8))
        attention = MODEL_CONFIG.attention
        token = attention.kv_lora_rank * itemsize + 4 * attention.qk_rope_head_dim
        assert page == 8 * MODEL_CONFIG.num_layers * (token + (4 if dtype else 0))


def test_the_kernel_is_asked_for_the_caches_type():
    """Hopper's reads 8 bits; of anything else a warning would say that XLA's runs."""
    runtime = RuntimeConfig(param_dtype="bfloat16", latent_dtype="fp8")
    device = type("Card", (), {"platform": "gpu", "device_kind": "NVIDIA H100 80GB HBM3"})()
    assert choose_kernels(device, deepseek_v2_lite.config, runtime).mla_decode == "hopper"
    chip = type("Chip", (), {"platform": "tpu", "device_kind": "TPU v5"})()
    with pytest.raises(ValueError, match=r"latent_dtype='fp8': not on TPUs"):
        choose_kernels(chip, deepseek_v2_lite.config, runtime)


def test_a_cache_of_8_bits_makes_no_program_one_of_quantised_weights(monkeypatch, tmp_path):
    """Whose options on a GPU leave out what steps with plain weights need (`xla_options`)."""
    asked: list[bool] = []

    def options(platform: str, *, quantised: bool, unrolled: bool = False) -> dict[str, bool]:
        asked.append(quantised)
        return {}

    forget_programs()
    monkeypatch.setattr("dsjax.engine.compiled.inference_options", options)
    request = random_requests(3, 1)
    Engine(a_model(MODEL_CONFIG, "int8"), TOKENIZER, CONFIG).generate(request)
    assert asked
    assert not any(asked)
    save(a_model(MODEL_CONFIG, None), tmp_path / "model")
    small = load_weights(tmp_path / "model", quantize="int4")
    asked.clear()
    Engine(small, TOKENIZER, CONFIG).generate(request)
    assert any(asked)
    forget_programs()


def test_load_takes_the_type_and_refuses_another(tmp_path):
    save(a_model(MODEL_CONFIG, None), tmp_path / "model")
    model = load(tmp_path / "model", dtype="float32", latent_dtype="fp8")
    assert model.options.latent_dtype == jnp.float8_e4m3fn
    with pytest.raises(ValueError, match=r"latent_dtype='int3': must be one of int8, fp8"):
        load(tmp_path / "model", latent_dtype="int3")  # type: ignore[arg-type]
