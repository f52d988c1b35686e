"""Which implementation of each kernel a model runs: chosen once, carried, logged."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass

import jax

from dsjax.config import ModelConfig

_LOG = logging.getLogger(__name__)

# Head dims that the Pallas attention kernels are written for: nope, rope, value, latent.
_KERNEL_HEAD_DIMS = (128, 64, 128, 512)


@dataclass(frozen=True)
class Kernels:
    """Implementation names, one per op of `pallas_kernels`; hashable, so part of a jit key."""

    mla_attention: str = "xla"
    mla_decode: str = "xla"
    grouped_matmul: str = "xla"


def choose_kernels(device: jax.Device, config: ModelConfig) -> Kernels:
    """Chooses the implementations for a model on a device, and says so once in the log.

    Args:
        device: one device of the mesh; a compile-only device of a TPU topology counts as a TPU,
            so a CPU host that compiles for a pod gets the pod's kernels.
        config: the model; sizes that the Pallas kernels are not written for take the portable
            implementation.
    """
    attention = config.attention
    head_dims = (
        attention.qk_nope_head_dim,
        attention.qk_rope_head_dim,
        attention.v_head_dim,
        attention.kv_lora_rank,
    )
    return _choose(device.platform, device.device_kind, head_dims, config.dtype)


@functools.cache  # so that each choice is logged once
def _choose(platform: str, kind: str, head_dims: tuple[int, ...], dtype: str) -> Kernels:
    hopper = platform in ("gpu", "cuda") and ("H100" in kind or "H200" in kind)
    family = "tpu" if platform == "tpu" else "hopper" if hopper else "xla"
    grouped_matmul = "hopper" if hopper else "xla"  # there is no TPU kernel of it yet
    if family == "xla":
        chosen, why = Kernels(), "no kernels are written for this chip"
    elif dtype != "bfloat16":
        chosen, why = Kernels(), f"the {family} kernels compute in bfloat16, the model in {dtype}"
    elif head_dims != _KERNEL_HEAD_DIMS:
        chosen = Kernels(grouped_matmul=grouped_matmul)
        why = f"head dims {head_dims} are not the attention kernels' {_KERNEL_HEAD_DIMS}"
    else:
        chosen, why = Kernels(family, family, grouped_matmul), "all fit"
    _LOG.info("kernels on %s: %s (%s)", kind, chosen, why)
    return chosen
