"""What a run will need on a pod that is not here: its step compiled, and the program read."""

from dsjax.plan.collectives import CollectiveUse, count_collectives
from dsjax.plan.lower import lower_train_step
from dsjax.plan.topology import tpu_devices

__all__ = [
    "CollectiveUse",
    "count_collectives",
    "lower_train_step",
    "tpu_devices",
]
