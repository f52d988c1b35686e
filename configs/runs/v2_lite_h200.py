"""DeepSeek-V2-Lite on one H200, bfloat16 moments: one row of 4,096 tokens."""

from dataclasses import replace

from dsjax.config import BatchConfig, MeshConfig
from dsjax.configs.runs import v2_lite_v5e_16

config = replace(
    v2_lite_v5e_16.config,
    directory="runs/v2_lite_h200",
    batch=BatchConfig(size=1),
    mesh=MeshConfig(),
)
