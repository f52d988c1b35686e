"""What a layer keeps for its backward pass, and what that computes again."""

from __future__ import annotations

from typing import Any

import jax

from pallas_kernels.grouped_matmul import PRODUCT_NAME
from pallas_kernels.mla_attention import LSE_NAME, OUT_NAME

# What attention's backward kernel needs of the forward one.
_ATTENTION_NAMES = (OUT_NAME, LSE_NAME)


def with_remat(run: Any, policy: str) -> Any:
    """Returns a layer's function that keeps what `runtime.remat` says for its backward pass."""
    policies = jax.checkpoint_policies
    match policy:
        case "none":
            return run
        case "full":
            return jax.checkpoint(run)
        case "save_dots":  # kernels multiply too, where the policy sees no dot
            products = policies.save_only_these_names(*_ATTENTION_NAMES, PRODUCT_NAME)
            dots = policies.dots_with_no_batch_dims_saveable
            return jax.checkpoint(run, policy=policies.save_from_both_policies(dots, products))
        case "save_attention":
            return jax.checkpoint(run, policy=policies.save_only_these_names(*_ATTENTION_NAMES))
    raise ValueError(f"runtime.remat={policy!r}: no such policy")
