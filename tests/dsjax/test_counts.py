"""Parameters, cache and FLOPs against the published sizes."""

import importlib
from dataclasses import replace
from types import SimpleNamespace

import jax
import pytest
from flax import nnx

from dsjax.chips import peak_flops
from dsjax.configs.models import deepseek_v2, tiny
from dsjax.counts import count_parameters, describe, train_flops_per_token
from dsjax.model import DeepSeekV2
from tests.released_models import SIZES
from tests.small_models import SMALL

pytestmark = pytest.mark.core


@pytest.mark.parametrize("name", SIZES)
def test_the_released_models(name: str):
    config = importlib.import_module(f"dsjax.configs.models.{name}").config
    figures, sizes = describe(config, 4096), SIZES[name]
    assert figures["parameters"] == sizes.parameters
    assert figures["active_parameters"] == sizes.active_parameters
    assert figures["hf_tensors"] == sizes.hf_tensors
    assert figures["latent_cache_bytes_per_token"] == sizes.cache_bytes


def test_what_the_latent_cache_saves():
    figures = describe(deepseek_v2.config, 4096)
    assert figures["full_cache_bytes_per_token"] == 60 * 128 * (192 + 128) * 2
    assert figures["cache_saving"] == pytest.approx(1 - 69_120 / 4_915_200)


def test_parameters_are_those_that_a_model_has():
    total, active = count_parameters(SMALL)
    leaves = jax.tree.leaves(nnx.eval_shape(lambda: nnx.state(DeepSeekV2(SMALL, nnx.Rngs(0)))))
    assert total == sum(leaf.size for leaf in leaves)
    # Two sparse layers of eight experts, three at a time, of three matrices of 32 by 20.
    assert total - active == 2 * (8 - 3) * 3 * 32 * 20
    dense = replace(SMALL, moe=None, num_dense_layers=3)
    assert len(set(count_parameters(dense))) == 1


def test_flops_are_those_of_the_matmuls():
    config = tiny.config
    short, long = (train_flops_per_token(config, length) for length in (256, 1024))
    # Attention alone grows with the length: 4 heads of 48 and 32, over 4 layers.
    assert long - short == 768 * 4 * 4 * (4 * 48 + 3 * 32)
    _, active = count_parameters(config)
    assert short == 6 * (active - 258 * 128) + 256 * 4 * 4 * (4 * 48 + 3 * 32)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU v4", 275e12),
        ("TPU v4 lite", None),  # v4i
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        # A part of a card, and others that only begin like one.
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A100-SXM-64GB", None),
        ("NVIDIA H1000", None),
        ("cpu", None),
    ],
)
def test_a_peak_is_that_of_the_very_chip_or_none(kind, peak):
    assert peak_flops(SimpleNamespace(device_kind=kind)) == peak
