"""DeepSeek-V2 on two slices of 256 TPU v6e (v6e:16x16): a replica on each."""

from dataclasses import replace

from dsjax.config import BatchConfig, MeshConfig
from dsjax.configs.runs import v2_v6e_256

config = replace(
    v2_v6e_256.config,
    directory="runs/v2_v6e_2x256",
    batch=BatchConfig(size=1024),
    mesh=MeshConfig(data=2, fsdp=32, expert=8),
)
