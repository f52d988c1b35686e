"""DeepSeek-V2, V2.5, V2-Lite and their kin: `config.json` as Hugging Face has it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dsjax.config.fitting import MISFIT, describe, fit
from dsjax.config.model import AttentionConfig, ModelConfig, MoEConfig, Routing, YarnConfig, require


def _field(hf: Mapping[str, Any], name: str, kind: Any) -> Any:
    # Never a default: transformers' own are another model's (its q_lora_rank is 1536).
    if name not in hf:
        raise ValueError(f"config.json: the field {name!r} is missing")
    value = fit(hf[name], kind)
    require(value is not MISFIT, f"config.json {name}", hf[name], f"must be {describe(kind)}")
    return value


def _require_fields(hf: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Requires fields that this model has no choice about to be absent, None or as expected."""
    for name, only in expected.items():
        value = hf.get(name)
        require(value is None or value == only, f"config.json {name}", value, f"must be {only!r}")


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Null is a value of these: no compression of queries, no experts.
_NULLABLE = ("q_lora_rank", "n_routed_experts", "n_shared_experts")
# What changes nothing that this model computes. Any other field that is not read is refused.
_HARMLESS_FIELDS = _names(
    "_attn_implementation _name_or_path architectures attention_dropout auto_map "
    "aux_loss_alpha bos_token_id chunk_size_feed_forward dtype eos_token_id ep_size id2label "
    "is_decoder is_encoder_decoder label2id output_attentions output_hidden_states "
    "output_router_logits pad_token_id pretraining_tp problem_type return_dict "
    "router_aux_loss_coef seq_aux task_specific_params tokenizer_class torch_dtype "
    "transformers_version unsloth_version use_cache"
)
_READ_FIELDS = _names(
    "attention_bias first_k_dense_replace head_dim hidden_act hidden_size initializer_range "
    "intermediate_size kv_lora_rank max_position_embeddings mlp_bias model_type "
    "moe_intermediate_size moe_layer_freq n_group n_routed_experts n_shared_experts "
    "norm_topk_prob num_attention_heads num_experts_per_tok num_hidden_layers "
    "num_key_value_heads q_lora_rank qk_head_dim qk_nope_head_dim qk_rope_head_dim "
    "rms_norm_eps rope_parameters rope_scaling rope_theta routed_scaling_factor scoring_func "
    "tie_word_embeddings topk_group topk_method v_head_dim vocab_size"
)
_ROPE_FIELDS = _names(
    "attention_factor beta_fast beta_slow factor mscale mscale_all_dim "
    "original_max_position_embeddings partial_rotary_factor rope_theta rope_type truncate "
    "type"
)


def _refuse_unknown(hf: Mapping[str, Any], known: frozenset[str], where: str) -> None:
    """Refuses fields that might change what the model is; None and False ask for nothing."""
    unknown = sorted(
        name
        for name, value in hf.items()
        if name not in known and value is not None and value is not False
    )
    if unknown:
        raise ValueError(
            f"{where}: unknown fields {unknown}; remove those that change nothing in the model"
        )


def _rope(hf: Mapping[str, Any]) -> tuple[float, YarnConfig | None]:
    """Reads `rope_scaling` (older files) or `rope_parameters` (newer ones)."""
    newer, older = hf.get("rope_parameters") or {}, hf.get("rope_scaling") or {}
    for name, value in (("rope_parameters", newer), ("rope_scaling", older)):
        require(isinstance(value, Mapping), f"config.json {name}", value, "must be an object")
        _refuse_unknown(value, _ROPE_FIELDS, f"config.json {name}")
    _require_agreement(hf, newer, older)
    rope = newer or older
    theta = _field({"rope_theta": 10000.0, **hf, **rope}, "rope_theta", float)
    kind = rope.get("rope_type", rope.get("type", "default"))
    _require_fields(rope, {"partial_rotary_factor": 1.0})
    if kind == "default":
        return theta, None
    require(kind == "yarn", "config.json rope_scaling.type", kind, "must be yarn or default")
    _require_fields(rope, {"truncate": True})
    # Defaults of the released code.
    rope = {"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.0, **rope}
    yarn = YarnConfig(
        factor=_field(rope, "factor", float),
        original_length=_field(rope, "original_max_position_embeddings", int),
        beta_fast=_field(rope, "beta_fast", float),
        beta_slow=_field(rope, "beta_slow", float),
        mscale=_field(rope, "mscale", float),
        mscale_all_dim=_field(rope, "mscale_all_dim", float),
    )
    factor, ours = rope.get("attention_factor"), attention_factor(yarn)
    if factor is not None:
        close = isinstance(factor, int | float) and abs(factor - ours) <= 1e-6 * ours
        fault = f"must be {ours:.9g}, as by mscale"
        require(close, "config.json attention_factor", factor, fault)
    return theta, yarn


def attention_factor(yarn: YarnConfig) -> float:
    """Returns the factor on rotated queries and keys (YaRN, with DeepSeek's two scales)."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(yarn.factor) + 1.0 if yarn.factor > 1 else 1.0

    return scale(yarn.mscale) / scale(yarn.mscale_all_dim)


def _require_agreement(
    hf: Mapping[str, Any], newer: Mapping[str, Any], older: Mapping[str, Any]
) -> None:
    """Requires that what is spelled twice says one thing: readers differ in which they take."""
    for rope in (newer, older):
        if rope.get("type") and rope.get("rope_type"):
            _require_fields(rope, {"type": rope["rope_type"]})
    if newer and older:
        rotation = [
            {"rope_type": rope.get("rope_type", rope.get("type", "default"))}
            | {name: rope[name] for name in rope if name not in ("type", "rope_type", "rope_theta")}
            for rope in (newer, older)
        ]
        require(
            rotation[0] == rotation[1],
            "config.json rope_parameters",
            dict(newer),
            f"must agree with rope_scaling={dict(older)!r}",
        )
    thetas = [rope["rope_theta"] for rope in (hf, newer, older) if rope.get("rope_theta")]
    require(
        all(theta == thetas[0] for theta in thetas),
        "config.json rope_theta",
        thetas,
        "must be one number wherever it is given",
    )


def _refuse_quantised(hf: Mapping[str, Any]) -> None:
    for name in ("quantization_config", "compression_config"):
        found = hf.get(name)
        method = found.get("quant_method", "unknown") if isinstance(found, Mapping) else found
        require(
            not found,
            f"config.json {name}",
            method,
            "the weights are quantised, which is not read: convert them to bfloat16 first",
        )


def from_hf_config(hf: Mapping[str, Any]) -> ModelConfig:
    """Builds the ModelConfig that a DeepSeek-V2-family `config.json` describes.

    Args:
        hf: the parsed file.

    Raises:
        ValueError: a field is missing, or holds something that this model does not implement.
    """
    model_type = hf.get("model_type", "deepseek_v2")
    require(
        model_type == "deepseek_v2", "config.json model_type", model_type, "must be deepseek_v2"
    )
    _refuse_quantised(hf)
    _refuse_unknown(hf, _READ_FIELDS | _HARMLESS_FIELDS, "config.json")
    # A field that is null is one that is not there, but where null says something.
    hf = {name: value for name, value in hf.items() if value is not None or name in _NULLABLE}
    num_layers, num_heads = (
        _field(hf, "num_hidden_layers", int),
        _field(hf, "num_attention_heads", int),
    )
    _require_fields(
        hf,
        {
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "moe_layer_freq": 1,
            "scoring_func": "softmax",
            "num_key_value_heads": num_heads,
        },
    )
    nope, rotary = (_field(hf, f"qk_{part}_head_dim", int) for part in ("nope", "rope"))
    _require_fields(hf, {"qk_head_dim": nope + rotary})
    # transformers calls the rotary part so; other software the whole.
    sizes = (None, rotary, nope + rotary)
    require(
        hf.get("head_dim") in sizes, "config.json head_dim", hf.get("head_dim"), f"must be {rotary}"
    )
    # Defaults that transformers and the released code share.
    hf = {
        "first_k_dense_replace": 0,
        "initializer_range": 0.02,
        "norm_topk_prob": False,
        "rms_norm_eps": 1e-6,
        "routed_scaling_factor": 1.0,
        "topk_method": "greedy",
        **hf,
    }
    theta, yarn = _rope(hf)
    num_dense_layers = min(_field(hf, "first_k_dense_replace", int), num_layers)
    moe = None
    if _field(hf, "n_routed_experts", int | None) and num_dense_layers < num_layers:
        moe = MoEConfig(
            num_experts=_field(hf, "n_routed_experts", int),
            top_k=_field(hf, "num_experts_per_tok", int),
            intermediate_dim=_field(hf, "moe_intermediate_size", int),
            num_shared_experts=_field(hf, "n_shared_experts", int | None) or 0,
            num_groups=_field({"n_group": 1, **hf}, "n_group", int),
            top_groups=_field({"topk_group": 1, **hf}, "topk_group", int),
            routing=_field(hf, "topk_method", Routing),
            normalize_weights=_field(hf, "norm_topk_prob", bool),
            routed_scale=_field(hf, "routed_scaling_factor", float),
        )
    return ModelConfig(
        vocab_size=_field(hf, "vocab_size", int),
        hidden_dim=_field(hf, "hidden_size", int),
        num_layers=num_layers,
        num_dense_layers=num_dense_layers if moe else num_layers,
        intermediate_dim=_field(hf, "intermediate_size", int),
        norm_eps=_field(hf, "rms_norm_eps", float),
        max_length=_field(hf, "max_position_embeddings", int),
        init_std=_field(hf, "initializer_range", float),
        attention=AttentionConfig(
            num_heads=num_heads,
            kv_lora_rank=_field(hf, "kv_lora_rank", int),
            q_lora_rank=_field(hf, "q_lora_rank", int | None),
            qk_nope_head_dim=_field(hf, "qk_nope_head_dim", int),
            qk_rope_head_dim=_field(hf, "qk_rope_head_dim", int),
            v_head_dim=_field(hf, "v_head_dim", int),
            rope_theta=theta,
            yarn=yarn,
        ),
        moe=moe,
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
        if not (yarn.mscale and yarn.mscale_all_dim):
            # transformers takes the two scales only where there are both, and else its own.
            hf["rope_scaling"]["attention_factor"] = attention_factor(yarn)
    if moe is None:
        # transformers gives every layer below first_k_dense_replace a dense MLP.
        hf |= {"first_k_dense_replace": config.num_layers, "n_routed_experts": 0}
    else:
        hf |= {
            "first_k_dense_replace": config.num_dense_layers,
            "moe_intermediate_size": moe.intermediate_dim,
            "moe_layer_freq": 1,
            "n_group": moe.num_groups,
            "n_routed_experts": moe.num_experts,
            "n_shared_experts": moe.num_shared_experts,
            "norm_topk_prob": moe.normalize_weights,
            "num_experts_per_tok": moe.top_k,
            "routed_scaling_factor": moe.routed_scale,
            "scoring_func": "softmax",
            "seq_aux": True,
            "topk_group": moe.top_groups,
            "topk_method": moe.routing,
        }
    return hf


def read_otherwise(config: ModelConfig) -> list[str]:
    """Returns a line for each thing that transformers reads differently in an exported model."""
    moe, found = config.moe, []
    if moe is not None and moe.normalize_weights and moe.top_k > 1:
        found.append("it does not read norm_topk_prob, so it leaves gates unnormalised")
    if moe is not None and moe.num_shared_experts == 0:
        found.append("it makes shared experts of width 0, whose tensors it will miss")
    return found
