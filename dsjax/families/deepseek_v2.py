"""DeepSeek-V2, V2.5, V2-Lite and their kin: tensors as Hugging Face has them."""

from __future__ import annotations

import re

from dsjax.config.model import ModelConfig
from dsjax.families.tensors import HFTable, Row, place

_TOP = (
    Row("model.embed_tokens.weight", "W D", "embed.weight: W D"),
    Row("model.norm.weight", "D", "norm.weight: D"),
    Row("lm_head.weight", "W D", "lm_head.weight: D W"),
)
_EVERY_LAYER = (
    Row("input_layernorm.weight", "D", "attention_norm.weight: D"),
    Row("self_attn.kv_a_proj_with_mqa.weight", "C+R D", "attention.wkv_a.weight: D C+R"),
    Row("self_attn.kv_a_layernorm.weight", "C", "attention.kv_norm.weight: C"),
    Row(
        "self_attn.kv_b_proj.weight",
        "(H N+V) C",
        "attention.wk_b.weight: C H N",
        "attention.wv_b.weight: C H V",
    ),
    Row("self_attn.o_proj.weight", "D (H V)", "attention.wo.weight: H V D"),
    Row("post_attention_layernorm.weight", "D", "feed_forward_norm.weight: D"),
)
_COMPRESSED_QUERIES = (
    Row("self_attn.q_a_proj.weight", "Q D", "attention.wq_a.weight: D Q"),
    Row("self_attn.q_a_layernorm.weight", "Q", "attention.q_norm.weight: Q"),
    Row(
        "self_attn.q_b_proj.weight",
        "(H N+R) Q",
        "attention.wq_nope.weight: Q H N",
        "attention.wq_rope.weight: Q H R",
    ),
)
_PLAIN_QUERIES = (
    Row(
        "self_attn.q_proj.weight",
        "(H N+R) D",
        "attention.wq_nope.weight: D H N",
        "attention.wq_rope.weight: D H R",
    ),
)
_DENSE_MLP = (
    Row("mlp.gate_proj.weight", "F D", "feed_forward.w_gate.weight: D F"),
    Row("mlp.up_proj.weight", "F D", "feed_forward.w_up.weight: D F"),
    Row("mlp.down_proj.weight", "D F", "feed_forward.w_down.weight: F D"),
)
_ROUTER = (Row("mlp.gate.weight", "E D", "feed_forward.router.gate.weight: D E"),)
_EXPERT = (
    Row("mlp.experts.{expert}.gate_proj.weight", "F D", "feed_forward.w_gate.weight: D F"),
    Row("mlp.experts.{expert}.up_proj.weight", "F D", "feed_forward.w_up.weight: D F"),
    Row("mlp.experts.{expert}.down_proj.weight", "D F", "feed_forward.w_down.weight: F D"),
)
_SHARED_EXPERTS = (
    Row("mlp.shared_experts.gate_proj.weight", "F D", "feed_forward.shared.w_gate.weight: D F"),
    Row("mlp.shared_experts.up_proj.weight", "F D", "feed_forward.shared.w_up.weight: D F"),
    Row("mlp.shared_experts.down_proj.weight", "D F", "feed_forward.shared.w_down.weight: F D"),
)
# Tensors that old checkpoints carry and that follow from the config.
_IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def hf_table(config: ModelConfig) -> HFTable:
    """Writes the table out for a model, one entry per layer and expert."""
    dense = _sizes(config, config.intermediate_dim)
    found = [place(row, dense) for row in _TOP]
    queries = _PLAIN_QUERIES if config.attention.q_lora_rank is None else _COMPRESSED_QUERIES
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        sparse = layer >= config.num_dense_layers
        stack = ("moe_layers",) if sparse else ("dense_layers",)
        index = (layer - config.num_dense_layers if sparse else layer,)
        every = _EVERY_LAYER + queries + (_ROUTER if sparse else _DENSE_MLP)
        found += [place(row, dense, prefix, stack, index) for row in every]
        if not sparse:
            continue
        assert config.moe is not None
        expert = _sizes(config, config.moe.intermediate_dim)
        for number in range(config.moe.num_experts):
            found += [place(row, expert, prefix, stack, (*index, number)) for row in _EXPERT]
        if config.moe.num_shared_experts:
            shared = _sizes(config, config.moe.shared_intermediate_dim)
            found += [place(row, shared, prefix, stack, index) for row in _SHARED_EXPERTS]
    return HFTable.of({tensor.name: tensor for tensor in found}, _IGNORED)


def _sizes(config: ModelConfig, feed_forward: int) -> dict[str, int]:
    attention = config.attention
    return {
        "W": config.vocab_size,
        "D": config.hidden_dim,
        "H": attention.num_heads,
        "N": attention.qk_nope_head_dim,
        "R": attention.qk_rope_head_dim,
        "V": attention.v_head_dim,
        "Q": attention.q_lora_rank or 0,
        "C": attention.kv_lora_rank,
        "E": config.moe.num_experts if config.moe else 0,
        "F": feed_forward,
    }
