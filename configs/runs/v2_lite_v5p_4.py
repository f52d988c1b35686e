"""DeepSeek-V2-Lite on four TPU v5p (v5p:2x2x1, Google's v5p-8): eight rows of 4,096 a chip."""

from dataclasses import replace

from dsjax.config import BatchConfig, MeshConfig, OptimizerConfig
from dsjax.configs.runs import v2_lite_v5e_16

config = replace(
    v2_lite_v5e_16.config,
    directory="runs/v2_lite_v5p_4",
    batch=BatchConfig(size=32),
    mesh=MeshConfig(fsdp=4),
    optimizer=OptimizerConfig(rounding="stochastic"),
)
