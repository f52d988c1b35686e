"""DeepSeek-V2-Lite on two H100, bfloat16 moments: one row of 4,096 tokens a card."""

from dataclasses import replace

from dsjax.config import BatchConfig, MeshConfig
from dsjax.configs.runs import v2_lite_v5e_16

config = replace(
    v2_lite_v5e_16.config,
    directory="runs/v2_lite_h100_2",
    batch=BatchConfig(size=2),
    mesh=MeshConfig(expert=2),
)
