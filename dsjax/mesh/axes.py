"""The axes of the device mesh, and how devices are laid out along them."""

from __future__ import annotations

import math

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from dsjax.config import MeshConfig

MESH_AXES = ("data", "fsdp", "expert", "context", "tensor")

# Axes that divide the batch: outside the experts, the expert axis is one more data axis.
BATCH_AXES = ("data", "fsdp", "expert")


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Lays the devices out as a mesh.

    Args:
        config: devices along each axis; -1 takes what the others leave.
        devices: the devices, by default all of every process.

    Raises:
        ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(config, axis) for axis in MESH_AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    free = [axis for axis, size in sizes.items() if size == -1]
    if free and len(devices) % fixed == 0:
        sizes[free[0]] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(f"mesh={sizes}: does not fit the {len(devices)} devices there are")
    # An axis of the mesh may take part of a torus axis: 8 x 8 devices on a 4 x 4 x 4 pod.
    grid = mesh_utils.create_device_mesh(
        tuple(sizes.values()), devices, allow_split_physical_axes=True
    )
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
