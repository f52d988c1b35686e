"""The device mesh: its axes, and the tables from logical dims to them."""

from dsjax.mesh.axes import BATCH_AXES, MESH_AXES, make_mesh
from dsjax.mesh.rules import (
    ShardingRules,
    check_divisible,
    inference_rules,
    serving_rules,
    train_rules,
)

__all__ = [
    "BATCH_AXES",
    "MESH_AXES",
    "ShardingRules",
    "check_divisible",
    "inference_rules",
    "make_mesh",
    "serving_rules",
    "train_rules",
]
