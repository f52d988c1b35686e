"""Kernels are chosen from the chip and the model's sizes, in one place."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from configs.models import deepseek_v2, deepseek_v2_lite, tiny
from dsjax.kernels import choose_kernels

H200 = SimpleNamespace(platform="gpu", device_kind="NVIDIA H200")
A100 = SimpleNamespace(platform="gpu", device_kind="NVIDIA A100-SXM4-40GB")
V5P = SimpleNamespace(platform="tpu", device_kind="TPU v5")
CPU = SimpleNamespace(platform="cpu", device_kind="cpu")
PORTABLE = ("xla", "xla", "xla")


def ops(device, config):
    kernels = choose_kernels(device, config)
    return kernels.mla_attention, kernels.mla_decode, kernels.grouped_matmul


@pytest.mark.core
@pytest.mark.parametrize("config", [deepseek_v2.config, deepseek_v2_lite.config])
def test_released_sizes_get_the_chips_kernels(config):
    assert ops(V5P, config) == ("tpu", "tpu", "tpu")
    assert ops(H200, config) == ("hopper", "hopper", "hopper")
    assert ops(A100, config) == ops(CPU, config) == PORTABLE


@pytest.mark.core
@pytest.mark.parametrize(
    ("device", "transport"),
    [(V5P, "ragged"), (H200, "ragged_parts"), (A100, "ragged_parts"), (CPU, "fixed")],
)
def test_transport_of_the_expert_exchange(device, transport):
    assert choose_kernels(device, deepseek_v2.config).expert_exchange == transport


@pytest.mark.parametrize(
    ("device", "dtype", "router"),
    [
        (H200, "bfloat16", "bfloat16_terms"),
        (A100, "bfloat16", "bfloat16_terms"),
        (H200, "float32", "float32"),
        (V5P, "bfloat16", "float32"),
    ],
)
def test_the_routers_products(device, dtype, router):
    assert choose_kernels(device, replace(deepseek_v2.config, dtype=dtype)).router == router


def test_sizes_and_types_that_no_kernel_takes_get_the_portable_ones():
    # 96 wide experts and heads of 32 + 16
    assert ops(H200, replace(tiny.config, dtype="bfloat16")) == PORTABLE
    assert ops(V5P, tiny.config) == PORTABLE
    assert ops(H200, replace(deepseek_v2.config, dtype="float32")) == PORTABLE


def test_a_divided_width_must_still_fit_the_kernel():
    lite = deepseek_v2_lite.config  # 1,408 wide experts
    assert [choose_kernels(V5P, lite, n).grouped_matmul for n in (1, 2)] == ["tpu", "xla"]
    assert [choose_kernels(H200, lite, n).grouped_matmul for n in (2, 4)] == ["hopper", "xla"]
    assert choose_kernels(V5P, deepseek_v2.config, 4).grouped_matmul == "tpu"


def test_the_choice_is_logged_once(caplog):
    config = replace(deepseek_v2.config, vocab_size=1234)  # chosen for nowhere else
    with caplog.at_level("INFO", logger="dsjax.kernels"):
        for _ in range(3):
            choose_kernels(H200, config)
    kernels = choose_kernels(H200, config)
    assert [record.getMessage() for record in caplog.records] == [
        f"kernels on NVIDIA H200: {kernels}"
    ]
