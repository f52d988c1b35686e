"""What a model is: frozen dataclasses, nested by layer and checked on construction."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from dsjax.config.fitting import checked

Routing = Literal["greedy", "group_limited_greedy"]


def require(condition: bool, field_name: str, value: object, constraint: str) -> None:
    """Raises a one-line ValueError that names the field, its value and what it must satisfy."""
    if not condition:
        raise ValueError(f"{field_name}={value!r}: {constraint}")


def require_positive(owner: str, **fields: int | float | None) -> None:
    """Requires each field that is not None to be positive, finite, and as an integer an int32."""
    for name, value in fields.items():
        if value is not None:
            require(_is_finite(value) and value > 0, f"{owner}.{name}", value, "must be positive")
            fits = isinstance(value, float) or value < 2**31
            require(fits, f"{owner}.{name}", value, "must be less than 2**31")


def require_not_negative(owner: str, **fields: int | float) -> None:
    """Requires each field to be zero or positive, finite, and as an integer an int64."""
    for name, value in fields.items():
        ok = _is_finite(value) and value >= 0
        require(ok, f"{owner}.{name}", value, "must be finite and not negative")
        fits = isinstance(value, float) or value < 2**63
        require(fits, f"{owner}.{name}", value, "must be less than 2**63")


def require_seed(field_name: str, value: int) -> None:
    """Requires what a generator of random numbers takes."""
    require(0 <= value < 2**32, field_name, value, "must be in [0, 2**32)")


def require_folder(field_name: str, value: str) -> None:
    """Requires a path of the file system, not an address such as gs://bucket/folder."""
    require(
        re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", value) is None,
        field_name,
        value,
        "must be a path of the file system: mount the bucket (docs/launching/storage.md)",
    )


def _is_finite(value: int | float) -> bool:
    return isinstance(value, int) or math.isfinite(value)  # an int may be past all floats


@checked
@dataclass(frozen=True)
class YarnConfig:
    """YaRN, the rotary frequencies of a context longer than the one trained on (§3.1.4).

    Attributes:
        factor: how many times longer the context is than `original_length`.
        original_length: tokens of context before the extension.
        beta_fast: rotations within `original_length` above which a frequency stays as it is.
        beta_slow: rotations below which a frequency is divided by `factor`.
        mscale: length correction applied to cos and sin.
        mscale_all_dim: length correction applied, squared, to the softmax scale.
    """

    factor: float = 40.0
    original_length: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    def __post_init__(self) -> None:
        require_positive("yarn", factor=self.factor, original_length=self.original_length)
        require_positive("yarn", beta_fast=self.beta_fast, beta_slow=self.beta_slow)
        for name in ("mscale", "mscale_all_dim"):
            value = getattr(self, name)
            require(_is_finite(value), f"yarn.{name}", value, "must be finite")
        require(self.factor >= 1, "yarn.factor", self.factor, "must be at least 1")
        require(
            self.beta_fast > self.beta_slow,
            "yarn.beta_fast",
            self.beta_fast,
            f"must exceed yarn.beta_slow={self.beta_slow}",
        )


@checked
@dataclass(frozen=True)
class AttentionConfig:
    """Multi-head latent attention (§2.1).

    Attributes:
        num_heads: query heads; keys and values have as many once expanded.
        kv_lora_rank: width of the latent that keys and values are expanded from.
        q_lora_rank: width of the query latent, or None for uncompressed queries (V2-Lite).
        qk_nope_head_dim: per-head query and key width without position.
        qk_rope_head_dim: rotated width; its key is one head shared by all.
        v_head_dim: per-head value width.
        rope_theta: base of the rotary frequencies.
        yarn: context extension, or None for plain rotary embedding.
    """

    num_heads: int
    kv_lora_rank: int = 512
    q_lora_rank: int | None = None
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    rope_theta: float = 10000.0
    yarn: YarnConfig | None = None

    def __post_init__(self) -> None:
        require_positive(
            "attention",
            num_heads=self.num_heads,
            kv_lora_rank=self.kv_lora_rank,
            q_lora_rank=self.q_lora_rank,
            qk_nope_head_dim=self.qk_nope_head_dim,
            qk_rope_head_dim=self.qk_rope_head_dim,
            v_head_dim=self.v_head_dim,
            rope_theta=self.rope_theta,
        )
        require(
            self.qk_rope_head_dim % 2 == 0,
            "attention.qk_rope_head_dim",
            self.qk_rope_head_dim,
            "must be even: rotary dims come in pairs",
        )


@checked
@dataclass(frozen=True)
class MoEConfig:
    """DeepSeekMoE: routed and shared experts (§2.2).

    Attributes:
        num_experts: routed experts.
        top_k: routed experts a token is sent to.
        intermediate_dim: hidden width of one expert.
        num_shared_experts: experts that every token passes through.
        num_groups: device groups the routed experts are divided into (n_group).
        top_groups: groups a token may be sent to (topk_group, the paper's M).
        routing: "greedy" takes the best experts anywhere, "group_limited_greedy" (§2.2.2) those
            of the best `top_groups` groups.
        normalize_weights: divide the chosen weights by their sum, where top_k > 1; otherwise scale
            them.
        routed_scale: factor on the weights when they are not normalised.
    """

    num_experts: int
    top_k: int
    intermediate_dim: int
    num_shared_experts: int = 0
    num_groups: int = 1
    top_groups: int = 1
    routing: Routing = "greedy"
    normalize_weights: bool = False
    routed_scale: float = 1.0

    def __post_init__(self) -> None:
        require_positive(
            "moe",
            num_experts=self.num_experts,
            top_k=self.top_k,
            intermediate_dim=self.intermediate_dim,
            num_groups=self.num_groups,
            top_groups=self.top_groups,
            routed_scale=self.routed_scale,
        )
        require(
            self.num_shared_experts >= 0,
            "moe.num_shared_experts",
            self.num_shared_experts,
            "must not be negative",
        )
        require(
            self.num_experts % self.num_groups == 0,
            "moe.num_groups",
            self.num_groups,
            f"must divide moe.num_experts={self.num_experts}",
        )
        require(
            self.top_groups <= self.num_groups,
            "moe.top_groups",
            self.top_groups,
            f"must not exceed moe.num_groups={self.num_groups}",
        )
        reachable = self.num_experts
        if self.routing == "group_limited_greedy":
            reachable = self.num_experts // self.num_groups * self.top_groups
        require(
            self.top_k <= reachable,
            "moe.top_k",
            self.top_k,
            f"must not exceed the {reachable} experts that a token can reach",
        )

    @property
    def shared_intermediate_dim(self) -> int:
        """Hidden width of the shared experts together: they are one wider MLP."""
        return self.num_shared_experts * self.intermediate_dim


@checked
@dataclass(frozen=True)
class ModelConfig:
    """A DeepSeek-V2-family decoder.

    Attributes:
        vocab_size: rows of the embedding and of the output head.
        hidden_dim: width of the residual stream.
        num_layers: decoder layers, the dense ones included.
        intermediate_dim: hidden width of a dense layer's MLP.
        attention: its attention.
        moe: its experts, or None for a dense model.
        num_dense_layers: first layers with a dense MLP (first_k_dense_replace).
        norm_eps: epsilon of the RMSNorms on the residual stream (those inside attention keep 1e-6).
        max_length: longest context, in tokens.
        init_std: standard deviation of the initial weights.
    """

    vocab_size: int
    hidden_dim: int
    num_layers: int
    intermediate_dim: int
    attention: AttentionConfig
    moe: MoEConfig | None = None
    num_dense_layers: int = 1
    norm_eps: float = 1e-6
    max_length: int = 4096
    init_std: float = 0.02

    def __post_init__(self) -> None:
        require_positive(
            "model",
            vocab_size=self.vocab_size,
            hidden_dim=self.hidden_dim,
            num_layers=self.num_layers,
            intermediate_dim=self.intermediate_dim,
            norm_eps=self.norm_eps,
            max_length=self.max_length,
            init_std=self.init_std,
        )
        require(
            0 <= self.num_dense_layers <= self.num_layers,
            "model.num_dense_layers",
            self.num_dense_layers,
            f"must be between 0 and model.num_layers={self.num_layers}",
        )
        require(
            self.moe is not None or self.num_dense_layers == self.num_layers,
            "model.moe",
            self.moe,
            f"is needed unless all num_layers={self.num_layers} are dense",
        )

    @property
    def num_moe_layers(self) -> int:
        """Layers whose MLP is a mixture of experts."""
        return self.num_layers - self.num_dense_layers
