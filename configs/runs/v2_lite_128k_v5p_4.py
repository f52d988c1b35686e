"""DeepSeek-V2-Lite on four TPU v5p (v5p:2x2x1): rows of 131,072 tokens, each over all four."""

from dataclasses import replace

from dsjax.config import BatchConfig, MeshConfig, OptimizerConfig
from dsjax.configs.runs import v2_lite_v5e_16

_short = v2_lite_v5e_16.config

config = replace(
    _short,
    directory="runs/v2_lite_128k_v5p_4",
    data=replace(_short.data, length=131_072),
    batch=BatchConfig(size=1),
    num_steps=1000,
    # Parameters and moments are divided over context as over fsdp.
    mesh=MeshConfig(fsdp=1, context=4),
    optimizer=OptimizerConfig(
        peak_learning_rate=4.2e-5, warmup_steps=50, decay_at=(), rounding="stochastic"
    ),
)
