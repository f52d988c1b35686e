"""Parameters, bytes and FLOPs of a model, counted from its own shapes."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Collection
from typing import Any

from flax import nnx

from dsjax.cache import full_bytes_per_token, latent_bytes_per_token
from dsjax.config import ModelConfig
from dsjax.families import hf_tensor_shapes
from dsjax.model import abstract_model

_LOOKED_UP = "embed."  # names of parameters that multiply nothing


def count_parameters(config: ModelConfig) -> tuple[int, int]:
    """Returns all parameters and those that one token uses (shared ones and top-k experts)."""
    sizes = _sizes(config).values()
    return sum(size for size, _ in sizes), sum(used for _, used in sizes)


def _sizes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Returns the size of each parameter, and how much of it one token uses."""
    found = {}
    for path, variable in nnx.to_flat_state(abstract_model(config)[1]):
        size = active = math.prod(variable.shape)
        # The experts' own matrices; router and shared lie a level deeper.
        if path[0] == "moe_layers" and path[-3] == "feed_forward":
            assert config.moe is not None
            active = size // config.moe.num_experts * config.moe.top_k
        found[".".join(map(str, path))] = (size, active)
    return found


def train_flops_per_token(config: ModelConfig, length: int, frozen: Collection[str] = ()) -> int:
    """Returns the FLOPs of forward and backward per token of a training sequence.

    Six per active matrix parameter (two forward, four backward; the embedding is a look-up), and
    of causal attention the half that is not masked: 2 H T (192 + 128) / 2 forward and, with the
    scores recomputed, 2 H T (3 * 192 + 2 * 128) / 2 backward. Recomputation of layers is not
    counted: it is a choice, not the model's work. Matrices that are not trained have no gradient of
    their own, two of the six.

    Args:
        config: the model.
        length: tokens of a sequence.
        frozen: patterns of names of parameters, as `optimizer.frozen` has them.
    """
    attention = config.attention
    used = {
        name: each for name, (_, each) in _sizes(config).items() if not name.startswith(_LOOKED_UP)
    }
    untrained = {name for pattern in frozen for name in fnmatch.filter(used, pattern)}
    qk = attention.qk_nope_head_dim + attention.qk_rope_head_dim
    attended = config.num_layers * attention.num_heads * length
    of_matrices = 6 * sum(used.values()) - 2 * sum(used[name] for name in untrained)
    return of_matrices + attended * (4 * qk + 3 * attention.v_head_dim)


def serving_flops(config: ModelConfig, tokens: int, chosen: int, pairs: int, form: str) -> int:
    """Returns the FLOPs of a forward pass over tokens whose latents are cached.

    Two per active matrix parameter of a token, the head's for tokens that are chosen alone, and two
    per pair of query and key, head and width.

    Args:
        config: the model.
        tokens: that are read.
        chosen: of these, those whose logits are wanted.
        pairs: queries times the keys that each sees.
        form: "expanded" attends with keys and values of each head (192 + 128), as prompts do;
            "absorbed" with the latents themselves (576 + 512), as single tokens do.
    """
    attention = config.attention
    _, active = count_parameters(config)
    vocabulary = config.vocab_size * config.hidden_dim
    if form == "absorbed":
        widths = 2 * attention.kv_lora_rank + attention.qk_rope_head_dim
    else:
        widths = attention.qk_nope_head_dim + attention.qk_rope_head_dim + attention.v_head_dim
    attended = config.num_layers * attention.num_heads * pairs * widths
    return 2 * ((active - 2 * vocabulary) * tokens + vocabulary * chosen + attended)


def describe(config: ModelConfig, length: int) -> dict[str, Any]:
    """Returns the figures that `dsjax info` prints.

    Args:
        config: the model.
        length: tokens of a training sequence, for the FLOPs.
    """
    total, active = count_parameters(config)
    latent, full = latent_bytes_per_token(config), full_bytes_per_token(config)
    return {
        "parameters": total,
        "active_parameters": active,
        "hf_tensors": len(hf_tensor_shapes(config)),
        "latent_cache_bytes_per_token": latent,
        "full_cache_bytes_per_token": full,
        "cache_saving": 1 - latent / full,
        "train_length": length,
        "train_flops_per_token": train_flops_per_token(config, length),
    }
