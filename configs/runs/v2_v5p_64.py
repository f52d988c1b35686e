"""DeepSeek-V2 on 64 TPU v5p (v5p:4x4x4): two rows of 4,096 tokens a chip."""

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
from dsjax.configs.models import deepseek_v2

config = TrainConfig(
    directory="runs/v2_v5p_64",
    model=deepseek_v2.config,
    data=DataConfig(sources=(SourceConfig("data/packed/train"),), tokenizer="data", length=4096),
    batch=BatchConfig(size=128),
    num_steps=100_000,
    runtime=RuntimeConfig(param_dtype="bfloat16"),
    mesh=MeshConfig(fsdp=8, expert=8),
    optimizer=OptimizerConfig(rounding="stochastic"),
    loss=LossConfig(balance=BalanceConfig(expert=0.003, device=0.05, communication=0.02)),
)
