"""Configuration: what a model is, what a run is, and how files and overrides become one."""

from dsjax.config.data import DataConfig, PrepareConfig, SourceConfig
from dsjax.config.engine import EngineConfig
from dsjax.config.mesh import MeshConfig
from dsjax.config.model import AttentionConfig, ModelConfig, MoEConfig, YarnConfig
from dsjax.config.optimizer import OptimizerConfig
from dsjax.config.quantisation import RECIPES, QuantisationConfig, QuantisationRule
from dsjax.config.runtime import KernelConfig, LatentDType, RuntimeConfig
from dsjax.config.serialize import from_json, to_json
from dsjax.config.serve import ServeConfig
from dsjax.config.train import (
    BalanceConfig,
    BatchConfig,
    CheckpointConfig,
    GuardConfig,
    LogConfig,
    LossConfig,
    TokenDropping,
    TrainConfig,
)
from dsjax.config.watch import ChecksConfig, WatchConfig

__all__ = [
    "RECIPES",
    "AttentionConfig",
    "BalanceConfig",
    "BatchConfig",
    "CheckpointConfig",
    "ChecksConfig",
    "DataConfig",
    "EngineConfig",
    "GuardConfig",
    "KernelConfig",
    "LatentDType",
    "LogConfig",
    "LossConfig",
    "MeshConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PrepareConfig",
    "QuantisationConfig",
    "QuantisationRule",
    "RuntimeConfig",
    "ServeConfig",
    "SourceConfig",
    "TokenDropping",
    "TrainConfig",
    "WatchConfig",
    "YarnConfig",
    "from_json",
    "to_json",
]
