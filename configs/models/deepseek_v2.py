"""DeepSeek-V2, 236B parameters with 21B active per token (arXiv 2405.04434, §3.1.2)."""

from dsjax.config import AttentionConfig, ModelConfig, MoEConfig, YarnConfig

config = ModelConfig(
    vocab_size=102400,
    hidden_dim=5120,
    num_layers=60,
    num_dense_layers=1,
    intermediate_dim=12288,
    max_length=163840,
    attention=AttentionConfig(
        num_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        yarn=YarnConfig(factor=40, original_length=4096, mscale=0.707, mscale_all_dim=0.707),
    ),
    moe=MoEConfig(
        num_experts=160,
        top_k=6,
        intermediate_dim=1536,
        num_shared_experts=2,
        num_groups=8,
        top_groups=3,
        routing="group_limited_greedy",
        routed_scale=16.0,
    ),
)
