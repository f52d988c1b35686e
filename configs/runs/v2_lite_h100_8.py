"""DeepSeek-V2-Lite on eight H100: two rows of 4,096 tokens a card."""

from dataclasses import replace

from dsjax.config import BatchConfig, MeshConfig, OptimizerConfig
from dsjax.configs.runs import v2_lite_v5e_16

config = replace(
    v2_lite_v5e_16.config,
    directory="runs/v2_lite_h100_8",
    batch=BatchConfig(size=16),
    mesh=MeshConfig(expert=8),
    optimizer=OptimizerConfig(rounding="stochastic"),
)
