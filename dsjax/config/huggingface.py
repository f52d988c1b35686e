"""A Hugging Face `config.json` as a ModelConfig, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsjax.config.model import AttentionConfig, ModelConfig, MoEConfig, YarnConfig, require

_ROUTING = {"greedy": "greedy", "group_limited_greedy": "group_limited_greedy"}


def _field(hf: Mapping[str, Any], name: str) -> Any:
    if name not in hf:
        raise ValueError(f"config.json: the field {name!r} is missing")
    return hf[name]


def _rope(hf: Mapping[str, Any]) -> tuple[float, YarnConfig | None]:
    """Reads `rope_scaling` (older files) or `rope_parameters` (newer ones)."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta", hf.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    require(kind == "yarn", "config.json rope_scaling.type", kind, "must be yarn or default")
    yarn = YarnConfig(
        factor=float(_field(rope, "factor")),
        original_length=int(_field(rope, "original_max_position_embeddings")),
        beta_fast=float(rope.get("beta_fast", 32)),
        beta_slow=float(rope.get("beta_slow", 1)),
        mscale=float(rope.get("mscale", 1.0)),
        mscale_all_dim=float(rope.get("mscale_all_dim", 0.0)),
    )
    return theta, yarn


def from_hf_config(hf: Mapping[str, Any], *, dtype: str | None = None) -> ModelConfig:
    """Builds the ModelConfig that a DeepSeek-V2-family `config.json` describes.

    Args:
        hf: the parsed file.
        dtype: compute type; None takes bfloat16.

    Raises:
        ValueError: a field is missing, or holds something that this model does not implement.
    """
    model_type = hf.get("model_type", "deepseek_v2")
    require(
        model_type == "deepseek_v2", "config.json model_type", model_type, "must be deepseek_v2"
    )
    for name, expected in {
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "moe_layer_freq": 1,
        "scoring_func": "softmax",
    }.items():
        value = hf.get(name, expected)
        require(value == expected, f"config.json {name}", value, f"must be {expected!r}")
    theta, yarn = _rope(hf)
    num_experts = hf.get("n_routed_experts") or 0
    moe = None
    if num_experts:
        routing = hf.get("topk_method", "greedy")
        require(
            routing in _ROUTING, "config.json topk_method", routing, f"must be in {list(_ROUTING)}"
        )
        moe = MoEConfig(
            num_experts=num_experts,
            top_k=_field(hf, "num_experts_per_tok"),
            intermediate_dim=_field(hf, "moe_intermediate_size"),
            num_shared_experts=hf.get("n_shared_experts") or 0,
            num_groups=hf.get("n_group") or 1,
            top_groups=hf.get("topk_group") or 1,
            routing=routing,
            normalize_weights=hf.get("norm_topk_prob", False),
            routed_scale=float(hf.get("routed_scaling_factor", 1.0)),
        )
    num_layers = _field(hf, "num_hidden_layers")
    return ModelConfig(
        vocab_size=_field(hf, "vocab_size"),
        hidden_dim=_field(hf, "hidden_size"),
        num_layers=num_layers,
        num_dense_layers=min(hf.get("first_k_dense_replace", 0), num_layers) if moe else num_layers,
        intermediate_dim=_field(hf, "intermediate_size"),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        max_length=_field(hf, "max_position_embeddings"),
        init_std=hf.get("initializer_range", 0.02),
        attention=AttentionConfig(
            num_heads=_field(hf, "num_attention_heads"),
            kv_lora_rank=_field(hf, "kv_lora_rank"),
            q_lora_rank=hf.get("q_lora_rank"),
            qk_nope_head_dim=_field(hf, "qk_nope_head_dim"),
            qk_rope_head_dim=_field(hf, "qk_rope_head_dim"),
            v_head_dim=_field(hf, "v_head_dim"),
            rope_theta=theta,
            yarn=yarn,
        ),
        moe=moe,
        dtype=dtype or "bfloat16",  # type: ignore[arg-type]
    )


def to_hf_config(config: ModelConfig, *, dtype: str, bos_id: int, eos_id: int) -> dict[str, Any]:
    """Builds the `config.json` that other software needs to load a model of ours.

    Args:
        config: the model.
        dtype: type of the tensors written beside it.
        bos_id: token that begins a document.
        eos_id: token that ends one.
    """
    attention, moe = config.attention, config.moe
    hf: dict[str, Any] = {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "hidden_act": "silu",
        "hidden_size": config.hidden_dim,
        "initializer_range": config.init_std,
        "intermediate_size": config.intermediate_dim,
        "kv_lora_rank": attention.kv_lora_rank,
        "max_position_embeddings": config.max_length,
        "num_attention_heads": attention.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": attention.num_heads,
        "q_lora_rank": attention.q_lora_rank,
        "qk_nope_head_dim": attention.qk_nope_head_dim,
        "qk_rope_head_dim": attention.qk_rope_head_dim,
        "rms_norm_eps": config.norm_eps,
        "rope_scaling": None,
        "rope_theta": attention.rope_theta,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_cache": True,
        "v_head_dim": attention.v_head_dim,
        "vocab_size": config.vocab_size,
    }
    if attention.yarn is not None:
        yarn = attention.yarn
        hf["rope_scaling"] = {
            "type": "yarn",
            "factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_length,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "mscale": yarn.mscale,
            "mscale_all_dim": yarn.mscale_all_dim,
        }
    if moe is None:
        # transformers gives every layer below first_k_dense_replace a dense MLP.
        hf |= {"first_k_dense_replace": config.num_layers, "n_routed_experts": None}
    else:
        hf |= {
            "first_k_dense_replace": config.num_dense_layers,
            "moe_intermediate_size": moe.intermediate_dim,
            "moe_layer_freq": 1,
            "n_group": moe.num_groups,
            "n_routed_experts": moe.num_experts,
            "n_shared_experts": moe.num_shared_experts or None,
            "norm_topk_prob": moe.normalize_weights,
            "num_experts_per_tok": moe.top_k,
            "routed_scaling_factor": moe.routed_scale,
            "scoring_func": "softmax",
            "seq_aux": True,
            "topk_group": moe.top_groups,
            "topk_method": moe.routing,
        }
    return hf
