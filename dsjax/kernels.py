"""Which implementation of each kernel a model runs: chosen once, carried, logged."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from dsjax.config import ModelConfig, QuantisationConfig, RuntimeConfig
from dsjax.mesh import ShardingRules
from dsjax.quantise import form_of, format_of
from pallas_kernels import (
    expert_permute,
    fp8_rows,
    grouped_matmul,
    mla_attention,
    mla_decode,
    quantised_matmul,
)
from pallas_kernels.chips import TPU_LANES, chip_of
from pallas_kernels.quantised import Format, QuantisedWeights, hopper_refusal

_LOG = logging.getLogger(__name__)

# Tokens of a page of the latent pool.
PAGE_SIZE = 64
# Tokens of a sequence that decode together at most: a few, for speculation. `mla_decode` must take
# them all.
MAX_DECODE_TOKENS = 4
ONE_DEVICE = ShardingRules()
# More tokens fill a GPU by themselves.
_SHARED_BESIDE = 256


@dataclass(frozen=True)
class Kernels:
    """Implementation names, one per op of `pallas_kernels`; hashable, so part of a jit key.

    Attributes:
        mla_attention: of attention in training and prefill.
        mla_decode: of absorbed decode.
        grouped_matmul: of the experts' products.
        quantised_matmul: of products with quantised matrices, those of experts apart: where it
            does not take one, "xla" does, and of many rows.
        quantised_products: "widen" or "fp8"; see `KernelConfig`.
        expert_permute: of copying tokens to their experts' rows.
        experts_in_place: whether generation lets `grouped_matmul` read one layer's experts within
            those of all layers, for kernels that fetch weights themselves: else they may be copied
            first.
        shared_beside: tokens up to which generation computes the shared experts beside the choice
            of the others, which for few takes as long: on GPUs, whose kernels can run side by side.
        unroll_decode: whether a decode step has every layer by itself; see `KernelConfig`.
        unroll_layers: whether a training step has; see `KernelConfig`.
        compare_few: whether few tokens' experts are chosen and sorted by comparing each with each:
            on GPUs, where a sort is a kernel of its own and takes as long for few as for many.
        min_decode_rows: the engine pads a decode step to multiples of so many rows: for a single
            one XLA's GPU compiler transposes the vocabulary's matrices first.
        router: of the experts' affinities; see `KernelConfig`, as for the next four.
        expert_exchange: how tokens move between devices that divide the experts.
        latent_exchange: how latents reach the devices that divide a row with theirs.
        exchange_chunks: parts of a device's tokens that are exchanged one by one.
        exchange_room: room of a pass over a device's experts, over the mean of what they get.
        pass_step: room of a pass comes in multiples of so many tokens or rows.
        expanded_keys: keys of a cached prefix, of each sequence, that are expanded at a time at
            least: up to 4 times as many of few sequences, and up to 8 times of long pieces.
    """

    mla_attention: str = "xla"
    mla_decode: str = "xla"
    grouped_matmul: str = "xla"
    quantised_matmul: str = "xla"
    quantised_products: str = "widen"
    expert_permute: str = "xla"
    experts_in_place: bool = False
    shared_beside: int = 0
    unroll_decode: bool = False
    unroll_layers: bool = False
    compare_few: bool = False
    min_decode_rows: int = 1
    router: str = "float32"
    expert_exchange: str = "fixed"
    latent_exchange: str = "gather"
    exchange_chunks: int = 1
    exchange_room: float = 1.25
    pass_step: int = 128
    expanded_keys: int = 1024

    def products_of(self, *forms: Format | None) -> str:
        """Returns how rows multiply matrices of these forms, None for one that is not quantised.

        In float8 only where all are stored in it.
        """
        products = self.quantised_products
        refused = any(fp8_rows.refusal(products, form) is not None for form in forms)
        return "widen" if refused else products

    def of_matrix(self, matrix: QuantisedWeights, dtype: DTypeLike) -> dict[str, str]:
        """Returns `products` and `implementation` of rows of a dtype times a matrix [K, N]."""
        products = self.products_of(matrix.format)
        reason = quantised_matmul.supported(
            self.quantised_matmul,
            width_in=matrix.shape[-2],
            width_out=matrix.shape[-1],
            dtype=dtype,
            form=matrix.format,
            products=products,
        )
        if reason is not None and products != "widen":
            _say_once(f"products in float8: the portable implementation runs, as {reason}")
        name = self.quantised_matmul if reason is None else "xla"
        return {"products": products, "implementation": name}


@functools.cache
def _say_once(message: str) -> None:
    _LOG.warning(message)


def choose_kernels(
    device: jax.Device,
    config: ModelConfig,
    runtime: RuntimeConfig,
    rules: ShardingRules = ONE_DEVICE,
) -> Kernels:
    """Chooses the implementations for a model on a device, and says so once in the log.

    Each op says what it takes, and is asked with the sizes that one device sees. Where an
    accelerator's own kernel does not take a size, the portable implementation runs, and a warning
    says which size is to blame.

    Args:
        device: one device of the mesh; a compile-only device of a TPU topology counts as a TPU,
            so a CPU host that compiles for a pod gets the pod's kernels.
        config: the model.
        runtime: the compute type, and kernels that the user names.
        rules: how devices divide the experts' hidden width and the tokens of a page. Of such pages
            each device attends with all heads, and with one token of a sequence at a time.

    Raises:
        ValueError: a kernel that the user names does not take the model's sizes; latents of 8 bits
            or products in float8 on a TPU; or such products of a model without weights in float8.
    """
    num_devices = 1 if rules.mesh is None else rules.mesh.size
    shards = _Shards(rules.num_shards("page_tokens"), rules.num_shards("mlp"), num_devices)
    return _choose(device.platform, device.device_kind, config, runtime, shards)


class _Shards(NamedTuple):
    """Devices that divide the tokens of a page, and experts' hidden width; and all of the mesh."""

    page_tokens: int
    mlp: int
    devices: int


@functools.cache  # so that each choice is logged once
def _choose(
    platform: str, kind: str, config: ModelConfig, runtime: RuntimeConfig, shards: _Shards
) -> Kernels:
    chip = chip_of(platform, kind)
    gpu, tpu = chip in ("hopper", "gpu"), platform == "tpu"
    native = "tpu" if tpu else "hopper" if chip == "hopper" else "xla"
    named, attention, dtype = runtime.kernels, config.attention, jnp.dtype(runtime.dtype)

    if tpu and runtime.latent_dtype is not None:
        # Read off a decode step for v5p: libtpu lays such a pool out in one way for the loop over
        # layers and in another for what is written into it, and copies all of it twice a layer.
        raise ValueError(
            f"runtime.latent_dtype={runtime.latent_dtype!r}: not on TPUs, where a step would copy "
            "the whole cache in every layer"
        )

    in_float8 = named.quantised_products == "fp8"
    if in_float8:
        _check_products(runtime.quantisation, tpu)

    def choose(op: str, name: str, refusal: Callable[[str], str | None]) -> str:
        """Returns the implementation named, or else the chip's own where it takes the sizes."""
        if name != "auto":
            reason = refusal(name)
            if reason is not None:
                raise ValueError(f"runtime.kernels.{op}={name!r}: {reason}")
            return name
        reason = refusal(native)
        if reason is None:
            return native
        _LOG.warning("%s on %s: the portable implementation runs, as %s", op, kind, reason)
        return "xla"

    def attention_refusal(name: str) -> str | None:
        return mla_attention.supported(
            name,
            nope_dim=attention.qk_nope_head_dim,
            rope_dim=attention.qk_rope_head_dim,
            value_dim=attention.v_head_dim,
            dtype=dtype,
            chip=chip,
        )

    def decode_refusal(name: str) -> str | None:
        most = MAX_DECODE_TOKENS if shards.page_tokens == 1 else 1
        reasons = (
            mla_decode.supported(
                name,
                kv_rank=attention.kv_lora_rank,
                rope_dim=pool_rope_dim(attention.qk_rope_head_dim, name),
                num_heads=attention.num_heads,
                num_tokens=num_tokens,
                page_size=PAGE_SIZE,
                dtype=dtype,
                pages_dtype=jnp.dtype(runtime.cached_dtype),
                chip=chip,
            )
            for num_tokens in range(1, most + 1)
        )
        return next((reason for reason in reasons if reason is not None), None)

    def experts_refusal(name: str) -> str | None:
        if config.moe is None:
            return None
        wide, narrow = config.hidden_dim, config.moe.intermediate_dim // shards.mlp
        matrices = {"w_gate": (wide, narrow), "w_up": (wide, narrow), "w_down": (narrow, wide)}
        # Products in float8 are of no other sizes.
        reasons = (
            grouped_matmul.supported(
                name,
                width_in=width_in,
                width_out=width_out,
                dtype=dtype,
                form=form_of(runtime.quantisation, f"moe_layers.feed_forward.{matrix}"),
                chip=chip,
            )
            for matrix, (width_in, width_out) in matrices.items()
        )
        return next((reason for reason in reasons if reason is not None), None)

    products = choose("grouped_matmul", named.grouped_matmul, experts_refusal)
    permute_refusal = expert_permute.supported(
        "hopper", width=config.hidden_dim, dtype=dtype, chip=chip
    )
    one_device = shards.devices == 1
    experts_form = form_of(runtime.quantisation, "moe_layers.feed_forward.w_gate")
    # XLA divides a product among devices, and no kernel.
    own_products = native == "hopper" and one_device and runtime.quantisation is not None
    unroll = named.unroll_decode
    if unroll is None:
        # Else XLA writes every layer's quantised weights out widened.
        read = runtime.quantisation is None or (
            own_products and (experts_form is None or hopper_refusal(experts_form) is None)
        )
        unroll = gpu and read
    router = named.router
    if router == "auto":  # a TPU's compiler splits float32 by itself
        router = "bfloat16_terms" if gpu and dtype == jnp.bfloat16 else "float32"
    transport = named.expert_exchange
    if transport == "auto":
        # XLA's CPU backend has neither of the ragged ones; "ragged" is some 70 times slower than
        # "ragged_parts" on two H200s.
        transport = "ragged" if tpu else "ragged_parts" if gpu else "fixed"
    chosen = Kernels(
        mla_attention=choose("mla_attention", named.mla_attention, attention_refusal),
        mla_decode=choose("mla_decode", named.mla_decode, decode_refusal),
        grouped_matmul=products,
        quantised_matmul="hopper" if own_products else "xla",
        quantised_products=named.quantised_products,
        expert_permute="hopper" if products == "hopper" and permute_refusal is None else "xla",
        experts_in_place=products in grouped_matmul.STACKS_IN_PLACE or experts_form is not None,
        shared_beside=_SHARED_BESIDE if gpu else 0,
        unroll_decode=unroll,
        unroll_layers=gpu if named.unroll_layers is None else named.unroll_layers,
        compare_few=gpu,
        min_decode_rows=16 if gpu else 1,
        router=router,
        expert_exchange=transport,
        latent_exchange=named.latent_exchange,
        exchange_chunks=named.exchange_chunks,
        exchange_room=named.exchange_room,
    )
    _LOG.info("kernels on %s: %s", kind, chosen)
    return chosen


def _check_products(recipe: QuantisationConfig | None, tpu: bool) -> None:
    """Checks that products in float8 have something to multiply.

    Raises:
        ValueError: they have not, or run on a TPU.
    """
    name = "runtime.kernels.quantised_products='fp8'"
    if tpu:
        raise ValueError(f"{name}: not on TPUs, where it would cost accuracy and spare nothing")
    forms = [] if recipe is None else [format_of(rule.format) for rule in recipe.rules]
    if all(form is None or fp8_rows.refusal("fp8", form) is not None for form in forms):
        raise ValueError(f"{name}: runtime.quantisation stores no weights in fp8 or fp8_block128")


def pool_rope_dim(rope_dim: int, decode_kernel: str) -> int:
    """Returns the width that the latent pool keeps rotary keys at for an `mla_decode` kernel.

    For "tpu" they are padded to whole lanes: they take no more of a TPU's memory so, and XLA does
    not copy the pool before each call.
    """
    return -(-rope_dim // TPU_LANES) * TPU_LANES if decode_kernel == "tpu" else rope_dim
