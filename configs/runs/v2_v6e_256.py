"""DeepSeek-V2 on 256 TPU v6e (v6e:16x16): two rows of 4,096 tokens a chip, bfloat16 moments."""

from dataclasses import replace

from dsjax.config import BatchConfig, MeshConfig, OptimizerConfig
from dsjax.configs.runs import v2_v5p_64

config = replace(
    v2_v5p_64.config,
    directory="runs/v2_v6e_256",
    batch=BatchConfig(size=512),
    mesh=MeshConfig(fsdp=32, expert=8),
    optimizer=OptimizerConfig(moment_dtype="bfloat16", rounding="stochastic"),
)
