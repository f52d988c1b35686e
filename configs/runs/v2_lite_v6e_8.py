"""DeepSeek-V2-Lite on eight TPU v6e (v6e:2x4): two rows of 4,096 tokens a chip."""

from dataclasses import replace

from dsjax.config import BatchConfig, MeshConfig
from dsjax.configs.runs import v2_lite_v5e_16

config = replace(
    v2_lite_v5e_16.config,
    directory="runs/v2_lite_v6e_8",
    batch=BatchConfig(size=16),
    mesh=MeshConfig(fsdp=2, expert=4),
)
