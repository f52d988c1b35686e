"""DeepSeek-V2 on 512 TPU v5p (v5p:8x8x8): two rows of 4,096 tokens a chip."""

from dataclasses import replace

from dsjax.config import BatchConfig, MeshConfig
from dsjax.configs.runs import v2_v5p_64

config = replace(
    v2_v5p_64.config,
    directory="runs/v2_v5p_512",
    batch=BatchConfig(size=1024),
    mesh=MeshConfig(data=8, fsdp=8, expert=8),
)
