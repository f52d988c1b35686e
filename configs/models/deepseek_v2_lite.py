"""DeepSeek-V2-Lite, 16B parameters with 2.4B active per token (arXiv 2405.04434, appendix B)."""

from dsjax.config import AttentionConfig, ModelConfig, MoEConfig, YarnConfig

config = ModelConfig(
    vocab_size=102400,
    hidden_dim=2048,
    num_layers=27,
    num_dense_layers=1,
    intermediate_dim=10944,
    max_length=163840,
    attention=AttentionConfig(
        num_heads=16,
        kv_lora_rank=512,
        yarn=YarnConfig(factor=40, original_length=4096, mscale=0.707, mscale_all_dim=0.707),
    ),
    moe=MoEConfig(
        num_experts=64,
        top_k=6,
        intermediate_dim=1408,
        num_shared_experts=2,
    ),
)
