"""What fewer bits cost: of a model that has learned something, and of matrices of full shape."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.configs.models import deepseek_v2_lite
from dsjax.quantise import format_of
from pallas_kernels.quantised import quantise, widened_products
from tests.oracle_attention import relative_error

# Most nats a token that the recipe may take the next token's distribution away, and most that bits
# a byte may grow, in per cent.
BOUNDS = {
    "int8": (0.001, 0.1),
    "fp8": (0.004, 0.3),
    "fp8 products": (0.01, 0.6),
    "int4": (0.03, 2.0),
    "int4 searched": (0.015, 1.0),
    "int8 latents": (0.001, 0.1),
    "fp8 latents": (0.004, 0.3),
}


@pytest.mark.slow
def test_a_trained_model_says_nearly_the_same(tmp_path, repository):
    run = [sys.executable, "-m", "tests.dsjax.quantise.quality_run", str(tmp_path)]
    # As users have it: the tests' own programs are hardly optimised, and would take minutes.
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    ended = subprocess.run(
        run, cwd=repository, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    figures = json.loads(ended.stdout.splitlines()[-1])
    divergence, nats = figures["divergence"], figures["nats"]
    assert nats["plain"] < 0.6 * np.log(256)  # it has learned something
    for name, (most, growth) in BOUNDS.items():
        assert divergence[name] <= most, figures
        assert nats[name] <= nats["plain"] * (1 + growth / 100), figures
    # Each is what it says it is.
    assert 0 < divergence["int8"] < divergence["fp8"] < divergence["int4"]
    assert divergence["fp8"] < divergence["fp8 products"]
    assert 0 < divergence["int8 latents"] < divergence["fp8 latents"]
    # A search is worth its time: by the usual 128 rows of text it takes off nine tenths.
    assert 0 < divergence["int4 searched"] < 0.4 * divergence["int4"]


_LITE = deepseek_v2_lite.config
_EXPERT = _LITE.moe.intermediate_dim if _LITE.moe else 0
WIDTHS = {
    "dense up": (_LITE.hidden_dim, _LITE.intermediate_dim),
    "dense down": (_LITE.intermediate_dim, _LITE.hidden_dim),
    "queries": (_LITE.hidden_dim, 16 * 192),
    "latents": (_LITE.hidden_dim, 576),
    "keys and values": (512, 16 * 256),
    "attention out": (16 * 128, _LITE.hidden_dim),
    "expert up": (_LITE.hidden_dim, _EXPERT),
    "expert down": (_EXPERT, _LITE.hidden_dim),
    # Of DeepSeek-V2, the widest sum that it has; columns do not depend on one another.
    "V2 attention out": (128 * 128, 512),
}


@pytest.mark.parametrize("place", WIDTHS)
def test_matrices_of_full_shape_multiply_nearly_the_same(place, rng):
    width_in, width_out = WIDTHS[place]
    weights = rng.standard_normal((width_out, width_in), np.float32) * np.float32(0.02)
    rows = rng.standard_normal((8, width_in), np.float32)
    want = rows.astype(np.float64) @ weights.T.astype(np.float64)
    for name, most in (
        ("int8", 0.01),
        ("fp8", 0.04),
        ("fp8_block128", 0.04),
        ("int4_g64", 0.12),
        ("int4_g64_zero", 0.12),
    ):
        form = format_of(name)
        assert form is not None
        stored = quantise(weights, form)
        got = widened_products(jnp.asarray(rows, jnp.bfloat16), jax.tree.map(jnp.asarray, stored))
        assert most / 5 < relative_error(got, want) <= most, name
