"""DeepSeek-V2-Lite on 16 TPU v5e (v5e:4x4), bfloat16 parameters and moments."""

from dsjax.config import (
    BalanceConfig,
    BatchConfig,
    DataConfig,
    LossConfig,
    MeshConfig,
    OptimizerConfig,
    RuntimeConfig,
    SourceConfig,
    TrainConfig,
)
from dsjax.configs.models import deepseek_v2_lite

config = TrainConfig(
    directory="runs/v2_lite_v5e_16",
    model=deepseek_v2_lite.config,
    data=DataConfig(sources=(SourceConfig("data/packed/train"),), tokenizer="data", length=4096),
    batch=BatchConfig(size=32),
    num_steps=100_000,
    runtime=RuntimeConfig(param_dtype="bfloat16"),
    mesh=MeshConfig(fsdp=4, expert=4),
    optimizer=OptimizerConfig(moment_dtype="bfloat16", rounding="stochastic"),
    loss=LossConfig(balance=BalanceConfig(expert=0.001, device=0.05, communication=0.02)),
)
