"""Kernels are chosen from the chip and the model's sizes, in one place."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from dsjax.config import (
    RECIPES,
    KernelConfig,
    QuantisationConfig,
    QuantisationRule,
    RuntimeConfig,
)
from dsjax.configs.models import deepseek_v2, deepseek_v2_5, deepseek_v2_lite, tiny
from dsjax.kernels import MAX_DECODE_TOKENS, PAGE_SIZE, Kernels, choose_kernels, pool_rope_dim
from dsjax.mesh import MESH_AXES, ShardingRules, inference_rules
from dsjax.model import abstract_model
from dsjax.quantise import format_of
from pallas_kernels import expert_permute, grouped_matmul, mla_attention, mla_decode
from pallas_kernels.quantised import quantise

H200 = SimpleNamespace(platform="gpu", device_kind="NVIDIA H200")
A100 = SimpleNamespace(platform="gpu", device_kind="NVIDIA A100-SXM4-40GB")
V5P = SimpleNamespace(platform="tpu", device_kind="TPU v5")
CPU = SimpleNamespace(platform="cpu", device_kind="cpu")
PORTABLE = ("xla", "xla", "xla")


def tensor(ways):
    """Rules of a mesh whose devices divide heads and hidden widths."""
    mesh = jax.sharding.AbstractMesh((1, 1, 1, 1, ways), MESH_AXES)
    return inference_rules(cast(Any, mesh))


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


@pytest.mark.parametrize(("device", "rows"), [(H200, 16), (A100, 16), (V5P, 1), (CPU, 1)])
def test_a_gpus_decode_step_has_whole_tiles_of_rows(device, rows):
    assert choose_kernels(device, deepseek_v2.config, BF16).min_decode_rows == rows


@pytest.mark.parametrize(("device", "beside"), [(H200, True), (V5P, False), (CPU, False)])
def test_few_tokens_shared_experts_are_computed_beside_the_choice_of_others(device, beside):
    assert (choose_kernels(device, deepseek_v2_lite.config, BF16).shared_beside > 0) is beside


def test_the_layers_of_a_decode_step_stand_by_themselves_on_gpus():
    def unrolled(device, runtime):
        return choose_kernels(device, deepseek_v2.config, runtime).unroll_decode

    zero_points = QuantisationConfig((QuantisationRule(r".*\.feed_forward\..*", "int4_g64_zero"),))
    int8, int4_zero = (replace(BF16, quantisation=it) for it in (RECIPES["int8"], zero_points))
    assert unrolled(H200, BF16)
    assert unrolled(A100, BF16)
    # Quantised weights where a kernel reads them: XLA would widen those of all layers.
    assert unrolled(H200, int8)
    assert not unrolled(H200, int4_zero)
    assert not unrolled(A100, int8)
    assert not unrolled(V5P, BF16)
    for asked in (True, False):
        runtime = replace(BF16, kernels=KernelConfig(unroll_decode=asked))
        assert unrolled(H200, runtime) is unrolled(V5P, runtime) is asked


def test_the_layers_of_training_stand_by_themselves_on_gpus():
    def unrolled(device, runtime=BF16):
        return choose_kernels(device, deepseek_v2.config, runtime).unroll_layers

    assert unrolled(H200)
    assert unrolled(A100)
    assert not unrolled(V5P)
    assert not unrolled(CPU)
    for asked in (True, False):
        runtime = replace(BF16, kernels=KernelConfig(unroll_layers=asked))
        assert unrolled(H200, runtime) is unrolled(V5P, runtime) is asked


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
    assert [choose_kernels(V5P, lite, BF16, tensor(n)).grouped_matmul for n in (1, 2)] == [
        "tpu",
        "xla",
    ]
    assert [choose_kernels(H200, lite, BF16, tensor(n)).grouped_matmul for n in (2, 4)] == [
        "hopper",
        "xla",
    ]
    assert choose_kernels(V5P, deepseek_v2.config, BF16, tensor(4)).grouped_matmul == "tpu"


def test_what_divides_a_dim_is_the_rules_to_say():
    """Not the axis "tensor": here hidden widths are over none."""
    mesh = jax.sharding.AbstractMesh((1, 1, 1, 2, 2), MESH_AXES)
    table = dict(inference_rules(None).table) | {"mlp": ()}
    rules = ShardingRules(cast(Any, mesh), tuple(table.items()))
    kernels = choose_kernels(H200, deepseek_v2_lite.config, BF16, rules)
    assert kernels.grouped_matmul == "hopper"  # 1,408 wide


def test_a_device_decodes_with_all_heads_however_they_are_divided():
    """Four of 16 would be too few rows for Hopper's kernel."""
    assert choose_kernels(H200, deepseek_v2_lite.config, BF16, tensor(4)).mla_decode == "hopper"


KINDS = (
    *(("tpu", kind) for kind in ("TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x")),
    *(("gpu", kind) for kind in ("NVIDIA H100 PCIe", "NVIDIA H200", "NVIDIA A100-SXM4-40GB")),
    ("cpu", "cpu"),
)
CONFIGS = (deepseek_v2.config, deepseek_v2_5.config, deepseek_v2_lite.config, tiny.config)


@pytest.mark.parametrize("ways", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_no_kernel_is_chosen_for_sizes_that_it_refuses(dtype, ways):
    """Of every released model on every chip, divided as far as the heads go."""
    for platform, kind in KINDS:
        device: Any = SimpleNamespace(platform=platform, device_kind=kind)
        for config in CONFIGS:
            attention, moe = config.attention, config.moe
            assert moe is not None
            if attention.num_heads % ways or moe.intermediate_dim % ways:
                continue
            kernels = choose_kernels(device, config, RuntimeConfig(dtype=dtype), tensor(ways))
            width, hidden = config.hidden_dim, moe.intermediate_dim // ways
            refusals = [
                mla_attention.supported(
                    kernels.mla_attention,
                    nope_dim=attention.qk_nope_head_dim,
                    rope_dim=attention.qk_rope_head_dim,
                    value_dim=attention.v_head_dim,
                    dtype=dtype,
                ),
                expert_permute.supported(kernels.expert_permute, width=width, dtype=dtype),
                *(
                    mla_decode.supported(
                        kernels.mla_decode,
                        kv_rank=attention.kv_lora_rank,
                        rope_dim=pool_rope_dim(attention.qk_rope_head_dim, kernels.mla_decode),
                        num_heads=attention.num_heads,
                        num_tokens=num_tokens + 1,
                        page_size=PAGE_SIZE,
                        dtype=dtype,
                    )
                    for num_tokens in range(MAX_DECODE_TOKENS if ways == 1 else 1)
                ),
                *(
                    grouped_matmul.supported(
                        kernels.grouped_matmul, width_in=k, width_out=n, dtype=dtype
                    )
                    for k, n in ((width, hidden), (hidden, width))
                ),
            ]
            assert not any(refusals), (kind, config, refusals)


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
        choose_kernels(H200, config, BF16, tensor(4))
    (message,) = [record.getMessage() for record in caplog.records if "grouped" in record.message]
    assert message.startswith("grouped_matmul on NVIDIA H200: the portable implementation runs")
    assert "352" in message  # 1,408 over four
    caplog.clear()
    with caplog.at_level("WARNING", logger="dsjax.kernels"):
        choose_kernels(CPU, config, BF16, tensor(4))
    assert not caplog.records


def test_few_tokens_that_decode_together_must_fit_the_kernel_too():
    """256 heads are 1,024 rows of four tokens, more than a TPU's kernel takes.

    Where devices divide pages, these are four times 256 rows.
    """
    wide = replace(deepseek_v2.config.attention, num_heads=256)
    config = replace(deepseek_v2.config, attention=wide)
    ways = [choose_kernels(V5P, config, BF16, tensor(n)).mla_decode for n in (1, 2)]
    assert ways == ["xla", "tpu"]


@pytest.mark.core
def test_a_named_kernel_never_falls_back():
    named = RuntimeConfig(kernels=KernelConfig(grouped_matmul="hopper"))
    with pytest.raises(ValueError, match=r"runtime.kernels.grouped_matmul='hopper': .*352"):
        choose_kernels(H200, deepseek_v2_lite.config, named, tensor(4))
    with pytest.raises(ValueError, match=r"runtime.kernels.grouped_matmul='hopper': .*chip"):
        choose_kernels(CPU, deepseek_v2_lite.config, named)


IN_FLOAT8 = KernelConfig(quantised_products="fp8")


def in_float8(recipe):
    return RuntimeConfig(kernels=IN_FLOAT8, quantisation=recipe)


def test_products_in_float8_are_asked_for_and_divide_among_no_devices():
    lite, fp8 = deepseek_v2_lite.config, in_float8(RECIPES["fp8"])

    def chosen(device, runtime, ways=1):
        kernels = choose_kernels(device, lite, runtime, tensor(ways))
        return kernels.quantised_products, kernels.quantised_matmul

    assert chosen(H200, BF16) == ("widen", "xla")
    assert chosen(H200, replace(BF16, quantisation=RECIPES["fp8"])) == ("widen", "hopper")
    assert chosen(H200, fp8) == ("fp8", "hopper")
    assert chosen(H200, fp8, 2) == chosen(A100, fp8) == chosen(CPU, fp8) == ("fp8", "xla")
    with pytest.raises(ValueError, match=r"runtime.kernels.quantised_products='fp8': not on TPUs"):
        chosen(V5P, fp8)
    for recipe in (None, RECIPES["int8"]):
        with pytest.raises(ValueError, match=r"products='fp8': runtime.* stores no weights in"):
            chosen(H200, in_float8(recipe))
    with pytest.raises(ValueError, match=r"KernelConfig.quantised_products='fp4'"):
        KernelConfig(quantised_products=cast(Any, "fp4"))


def test_each_matrix_is_multiplied_as_its_form_and_sizes_allow(caplog):
    kernels = choose_kernels(H200, deepseek_v2_lite.config, in_float8(RECIPES["fp8"]))

    def how(name, width_out, width_in, kernels=kernels):
        form = format_of(name)
        assert form is not None
        stored = jax.eval_shape(lambda: quantise(jnp.zeros((width_out, width_in)), form))
        return tuple(kernels.of_matrix(stored, jnp.bfloat16).values())

    with caplog.at_level("WARNING", logger="dsjax.kernels"):
        for name in ("fp8", "fp8_block128"):
            assert how(name, 2048, 10944) == ("fp8", "hopper")
        assert how("int8", 2048, 10944) == ("widen", "hopper")
        assert how("int8", 2080, 10944) == ("widen", "xla")
        assert how("int4_g32", 2048, 10944) == ("widen", "xla")
        assert how("fp8", 2048, 10944, Kernels()) == ("widen", "xla")
        assert not caplog.records
        for _ in range(2):
            assert how("fp8", 2080, 10944) == ("fp8", "xla")
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.endswith("as output width 2080 must be a multiple of 64")
    blocks = format_of("fp8_block128")
    assert kernels.products_of(blocks, blocks) == "fp8"
    assert kernels.products_of(blocks, None) == "widen"
    assert kernels.products_of(format_of("int4_g64")) == "widen"


@pytest.mark.slow
def test_a_whole_prefill_in_float8_lowers_for_hopper():
    """Two layers of V2-Lite: every stored matrix but the absorbed ones is multiplied in float8."""
    lite = replace(deepseek_v2_lite.config, num_layers=2, vocab_size=1024)
    runtime = replace(in_float8(RECIPES["fp8"]), param_dtype="bfloat16")

    def kernels_of(runtime):
        kernels = choose_kernels(H200, lite, runtime)
        graphdef, state = abstract_model(lite, runtime, None, kernels)
        tokens = jax.ShapeDtypeStruct((1, 1024), jnp.int32)
        run = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens))
        text = run.trace(state, tokens).lower(lowering_platforms=("cuda",)).as_text()
        return text.count("mosaic_gpu_v2")

    plain = replace(runtime, kernels=KernelConfig())
    # Of each layer wq_nope, wq_rope, wkv_a, wk_b, wv_b and wo; three of the dense layer; three of
    # the shared experts. The routed experts have as many kernels either way.
    products = 2 * 6 + 3 + 3
    # Rows are rounded before each, by a kernel but for the 10,944 columns of the dense layer.
    roundings = products - 1 + 2
    assert kernels_of(runtime) - kernels_of(plain) == products + roundings
