"""How devices are divided."""

from __future__ import annotations

from dataclasses import dataclass

from dsjax.config.fitting import checked
from dsjax.config.model import require


@checked
@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one of them may be -1 and takes what is left.

    Attributes:
        data: replicas of the parameters.
        fsdp: shards of each parameter, gathered just in time.
        expert: shards of the experts; elsewhere it divides the batch as data does.
        context: shards of each row of tokens, for training on long ones.
        tensor: shards of heads and hidden widths.
    """

    data: int = 1
    fsdp: int = -1
    expert: int = 1
    context: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = (self.data, self.fsdp, self.expert, self.context, self.tensor)
        require(sizes.count(-1) <= 1, "mesh", sizes, "at most one axis may be -1")
        for name in ("data", "fsdp", "expert", "context", "tensor"):
            value = getattr(self, name)
            require(value == -1 or value > 0, f"mesh.{name}", value, "must be positive or -1")
