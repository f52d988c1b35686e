"""DeepSeek-V2 on 64 TPU 7x (tpu7x:4x4x4), 128 devices: two rows of 4,096 tokens a device."""

from dataclasses import replace

from dsjax.config import BatchConfig, MeshConfig
from dsjax.configs.runs import v2_v5p_64

config = replace(
    v2_v5p_64.config,
    directory="runs/v2_tpu7x_64",
    batch=BatchConfig(size=256),
    mesh=MeshConfig(fsdp=16, expert=8),
)
