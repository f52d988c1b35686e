"""Fine-tuning of DeepSeek-V2-Lite on one H100 of 80 GB: routed experts and their routers stay.

Of 15.7B parameters 1.3B are trained, with float32 moments; the others take 2 bytes each. It begins
with the released weights, a Hugging Face folder at `checkpoints/deepseek_v2_lite`.
"""

from dataclasses import replace

from dsjax.config import BalanceConfig, BatchConfig, LossConfig, MeshConfig, OptimizerConfig
from dsjax.configs.runs import v2_lite_v5e_16

config = replace(
    v2_lite_v5e_16.config,
    directory="runs/v2_lite_finetune_h100",
    init_from="checkpoints/deepseek_v2_lite",
    batch=BatchConfig(size=32, accumulate=16),
    num_steps=1000,
    mesh=MeshConfig(),
    optimizer=OptimizerConfig(
        peak_learning_rate=1e-5,
        warmup_steps=50,
        decay_at=(0.8,),
        rounding="stochastic",
        frozen=("moe_layers.feed_forward.w_*", "moe_layers.feed_forward.router.*"),
    ),
    loss=LossConfig(balance=BalanceConfig(expert=0, device=0, communication=0)),
)
