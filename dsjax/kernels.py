"""Which implementation of each kernel a model runs: chosen once, carried, logged."""

from __future__ import annotations

import dataclasses
import functools
import logging
from dataclasses import dataclass

import jax

from dsjax.config import KernelConfig, ModelConfig, RuntimeConfig

_LOG = logging.getLogger(__name__)

# Head dims that the Pallas attention kernels are written for: nope, rope, value, latent.
_KERNEL_HEAD_DIMS = (128, 64, 128, 512)
# The experts' kernels of a chip take multiples of these: of hidden and of intermediate widths.
_EXPERT_WIDTHS = {"tpu": (128, 128), "hopper": (128, 64), "xla": (1, 1)}


@dataclass(frozen=True)
class Kernels:
    """Implementation names, one per op of `pallas_kernels`; hashable, so part of a jit key.

    Attributes:
        mla_attention: of attention in training and prefill.
        mla_decode: of absorbed decode.
        grouped_matmul: of the experts' products.
        experts_in_place: whether generation lets it read one layer's experts within those of all
            layers, for kernels that fetch weights themselves: else they may be copied first.
        router: of the experts' affinities: "float32" multiplies in full precision; for bfloat16
            tokens "bfloat16_terms" comes to as much by products that matrix units take.
        expert_exchange: how tokens move between devices that divide the experts: "ragged" (TPUs)
            and "ragged_parts" (GPUs) send what there is, "fixed" as much as there might be.
        exchange_chunks: parts of a device's tokens that are exchanged one by one, so that one is
            computed while the next is under way.
        exchange_room: tokens that one pass over a device's experts has room for, over an even
            share of them; where there are more, it takes more passes.
        pass_step: room of a pass comes in multiples of so many tokens or rows.
    """

    mla_attention: str = "xla"
    mla_decode: str = "xla"
    grouped_matmul: str = "xla"
    experts_in_place: bool = False
    router: str = "float32"
    expert_exchange: str = "fixed"
    exchange_chunks: int = 1
    exchange_room: float = 1.5
    pass_step: int = 128


def choose_kernels(
    device: jax.Device, config: ModelConfig, runtime: RuntimeConfig, tensor: int = 1
) -> Kernels:
    """Chooses the implementations for a model on a device, and says so once in the log.

    Args:
        device: one device of the mesh; a compile-only device of a TPU topology counts as a TPU,
            so a CPU host that compiles for a pod gets the pod's kernels.
        config: the model; sizes and types that the Pallas kernels are not written for take the
            portable implementation.
        runtime: the compute type, and kernels that the user names.
        tensor: devices that divide the experts' hidden width; what is left must fit the kernel.
    """
    return _choose(device.platform, device.device_kind, config, runtime, tensor)


@functools.cache  # so that each choice is logged once
def _choose(
    platform: str, kind: str, config: ModelConfig, runtime: RuntimeConfig, tensor: int
) -> Kernels:
    tpu = platform == "tpu"
    gpu = platform in ("gpu", "cuda", "rocm")
    hopper = gpu and ("H100" in kind or "H200" in kind)
    attention = config.attention
    head_dims = (
        attention.qk_nope_head_dim,
        attention.qk_rope_head_dim,
        attention.v_head_dim,
        attention.kv_lora_rank,
    )
    bf16 = runtime.dtype == "bfloat16"  # what all the kernels compute in
    heads_fit = bf16 and head_dims == _KERNEL_HEAD_DIMS
    width = 0 if config.moe is None else config.moe.intermediate_dim // tensor
    ours = "tpu" if tpu else "hopper" if hopper else "xla"
    hidden_step, step = _EXPERT_WIDTHS[ours]
    widths_fit = bf16 and config.hidden_dim % hidden_step == width % step == 0
    chosen = Kernels(
        mla_attention=ours if heads_fit else "xla",
        mla_decode=ours if heads_fit else "xla",
        grouped_matmul=ours if widths_fit else "xla",
        experts_in_place=tpu and widths_fit,
        # A TPU's compiler splits float32 by itself.
        router="bfloat16_terms" if gpu and bf16 else "float32",
        # XLA's CPU backend has neither of the ragged ones; "ragged" is some 70
        # times slower than "ragged_parts" on two H200s.
        expert_exchange="ragged" if tpu else "ragged_parts" if gpu else "fixed",
    )
    chosen = _with_named(chosen, runtime.kernels)
    _LOG.info("kernels on %s: %s", kind, chosen)
    return chosen


def _with_named(chosen: Kernels, named: KernelConfig) -> Kernels:
    """Puts what the user names in place of what was chosen."""
    fields = {f.name: getattr(named, f.name) for f in dataclasses.fields(named)}
    return dataclasses.replace(chosen, **{n: v for n, v in fields.items() if v != "auto"})
