"""A model small enough for two CPU cores, with every feature of DeepSeek-V2."""

from dsjax.config import AttentionConfig, ModelConfig, MoEConfig, YarnConfig

config = ModelConfig(
    vocab_size=258,
    hidden_dim=128,
    num_layers=4,
    num_dense_layers=1,
    intermediate_dim=384,
    max_length=1024,
    attention=AttentionConfig(
        num_heads=4,
        q_lora_rank=96,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        yarn=YarnConfig(factor=4, original_length=256, mscale=0.707, mscale_all_dim=0.707),
    ),
    moe=MoEConfig(
        num_experts=16,
        top_k=4,
        intermediate_dim=96,
        num_shared_experts=2,
        num_groups=4,
        top_groups=2,
        routing="group_limited_greedy",
        normalize_weights=False,
        routed_scale=2.0,
    ),
)
