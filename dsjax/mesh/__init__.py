"""The device mesh: its axes, and the tables from logical dims to them."""

from dsjax.mesh.axes import BATCH_AXES, MESH_AXES
from dsjax.mesh.rules import (
    ShardingRules,
    check_divisible,
    inference_rules,
    serving_rules,
    train_rules,
)
from dsjax.mesh.slices import make_mesh
from dsjax.mesh.stripes import from_stripes, to_stripes

__all__ = [
    "BATCH_AXES",
    "MESH_AXES",
    "ShardingRules",
    "check_divisible",
    "from_stripes",
    "inference_rules",
    "make_mesh",
    "serving_rules",
    "to_stripes",
    "train_rules",
]
