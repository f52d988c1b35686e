"""Kernels are chosen from the chip and the model's sizes, in one place."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from dsjax.config import KernelConfig, RuntimeConfig
from dsjax.configs.models import deepseek_v2, deepseek_v2_lite, tiny
from dsjax.kernels import choose_kernels

H200 = SimpleNamespace(platform="gpu", device_kind="NVIDIA H200")
A100 = SimpleNamespace(platform="gpu", device_kind="NVIDIA A100-SXM4-40GB")
V5P = SimpleNamespace(platform="tpu", device_kind="TPU v5")
CPU = SimpleNamespace(platform="cpu", device_kind="cpu")
PORTABLE = ("xla", "xla", "xla")


BF16, FLOAT32 = RuntimeConfig(), RuntimeConfig(dtype="float32")


def ops(device, config, runtime=BF16):
    kernels = choose_kernels(device, config, runtime)
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
    assert choose_kernels(device, deepseek_v2.config, BF16).expert_exchange == transport


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
    runtime = RuntimeConfig(dtype=dtype)
    assert choose_kernels(device, deepseek_v2.config, runtime).router == router


def test_sizes_and_types_that_no_kernel_takes_get_the_portable_ones():
    # 96 wide experts and heads of 32 + 16
    assert ops(H200, tiny.config) == PORTABLE
    assert ops(V5P, tiny.config) == PORTABLE
    assert ops(H200, deepseek_v2.config, FLOAT32) == PORTABLE


def test_a_divided_width_must_still_fit_the_kernel():
    lite = deepseek_v2_lite.config  # 1,408 wide experts
    assert [choose_kernels(V5P, lite, BF16, n).grouped_matmul for n in (1, 2)] == ["tpu", "xla"]
    assert [choose_kernels(H200, lite, BF16, n).grouped_matmul for n in (2, 4)] == ["hopper", "xla"]
    assert choose_kernels(V5P, deepseek_v2.config, BF16, 4).grouped_matmul == "tpu"


def test_the_choice_is_logged_once(caplog):
    config = replace(deepseek_v2.config, vocab_size=1234)  # chosen for nowhere else
    with caplog.at_level("INFO", logger="dsjax.kernels"):
        for _ in range(3):
            choose_kernels(H200, config, BF16)
    kernels = choose_kernels(H200, config, BF16)
    assert [record.getMessage() for record in caplog.records] == [
        f"kernels on NVIDIA H200: {kernels}"
    ]


@pytest.mark.core
def test_a_named_kernel_is_the_one_that_runs():
    named = KernelConfig(mla_decode="xla", exchange_chunks=2)
    kernels = choose_kernels(H200, deepseek_v2.config, RuntimeConfig(kernels=named))
    assert (kernels.mla_attention, kernels.mla_decode) == ("hopper", "xla")
    assert kernels.exchange_chunks == 2
    all_xla = RuntimeConfig(kernels=KernelConfig.all_of("xla"))
    assert ops(V5P, deepseek_v2.config, all_xla) == PORTABLE


@pytest.mark.core
def test_a_fallback_on_an_accelerator_is_a_warning_that_names_the_size(caplog):
    config = replace(deepseek_v2_lite.config, vocab_size=4321)  # chosen for nowhere else
    with caplog.at_level("WARNING", logger="dsjax.kernels"):
        choose_kernels(H200, config, BF16, tensor=4)
    (message,) = [record.getMessage() for record in caplog.records if "grouped" in record.message]
    assert message.startswith("grouped_matmul on NVIDIA H200: the portable implementation runs")
    assert "352" in message  # 1,408 over four
    caplog.clear()
    choose_kernels(CPU, config, BF16, tensor=4)
    assert not caplog.records


@pytest.mark.core
def test_a_named_kernel_never_falls_back():
    named = RuntimeConfig(kernels=KernelConfig(grouped_matmul="hopper"))
    with pytest.raises(ValueError, match=r"runtime.kernels.grouped_matmul='hopper': .*352"):
        choose_kernels(H200, deepseek_v2_lite.config, named, tensor=4)
    with pytest.raises(ValueError, match=r"runtime.kernels.grouped_matmul='hopper': .*chip"):
        choose_kernels(CPU, deepseek_v2_lite.config, named)
