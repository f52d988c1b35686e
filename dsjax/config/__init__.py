"""Configuration: what a model is, what a run is, and how files and overrides become one."""

from dsjax.config.data import DataConfig, PrepareConfig, SourceConfig
from dsjax.config.mesh import MeshConfig
from dsjax.config.model import AttentionConfig, ModelConfig, MoEConfig, YarnConfig
from dsjax.config.runtime import KernelConfig, RuntimeConfig
from dsjax.config.serialize import from_json, to_json
from dsjax.config.train import (
    BalanceConfig,
    BatchConfig,
    CheckpointConfig,
    GuardConfig,
    LogConfig,
    LossConfig,
    OptimizerConfig,
    TokenDropping,
    TrainConfig,
)

__all__ = [
    "AttentionConfig",
    "BalanceConfig",
    "BatchConfig",
    "CheckpointConfig",
    "DataConfig",
    "GuardConfig",
    "KernelConfig",
    "LogConfig",
    "LossConfig",
    "MeshConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PrepareConfig",
    "RuntimeConfig",
    "SourceConfig",
    "TokenDropping",
    "TrainConfig",
    "YarnConfig",
    "from_json",
    "to_json",
]
