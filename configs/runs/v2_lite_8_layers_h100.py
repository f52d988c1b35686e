"""The first 8 layers of DeepSeek-V2-Lite on one H100: four rows of 4,096 tokens."""

from dataclasses import replace

from dsjax.config import BatchConfig, MeshConfig, RuntimeConfig
from dsjax.configs.runs import v2_lite_v5e_16

config = replace(
    v2_lite_v5e_16.config,
    directory="runs/v2_lite_8_layers_h100",
    model=replace(v2_lite_v5e_16.config.model, num_layers=8),
    batch=BatchConfig(size=4),
    runtime=RuntimeConfig(param_dtype="bfloat16", remat="save_attention"),
    mesh=MeshConfig(),
)
