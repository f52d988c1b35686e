"""Configuration: what a model is, what a run is, and how files and overrides become one."""

from dsjax.config.model import AttentionConfig, ModelConfig, MoEConfig, YarnConfig
from dsjax.config.run import (
    BalanceConfig,
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    GuardConfig,
    LogConfig,
    LossConfig,
    MeshConfig,
    OptimizerConfig,
    SourceConfig,
    TokenDropping,
    TrainConfig,
)
from dsjax.config.serialize import from_json, to_json

__all__ = [
    "AttentionConfig",
    "BalanceConfig",
    "BatchConfig",
    "CheckpointConfig",
    "DataConfig",
    "GuardConfig",
    "LogConfig",
    "LossConfig",
    "MeshConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimizerConfig",
    "SourceConfig",
    "TokenDropping",
    "TrainConfig",
    "YarnConfig",
    "from_json",
    "to_json",
]
