"""Meshes over several slices of TPUs, which no torus joins."""

from __future__ import annotations

import math
from dataclasses import replace

import jax
import numpy as np
from jax.sharding import Mesh

from dsjax.config import MeshConfig
from dsjax.mesh import axes
from dsjax.mesh.axes import MESH_AXES

# Those along which little enough is sent for the network between slices, the least first.
_BETWEEN = ("data", "fsdp")


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Lays the devices out as a mesh.

    Slices lie one after the other along `data`, or along `fsdp` where they do not divide that;
    all other axes stay within a slice.

    Args:
        config: devices along each axis; -1 takes what the others leave.
        devices: the devices, by default all of every process.

    Raises:
        ValueError: the sizes do not multiply to the number of devices, slices differ in size, or
            they divide neither axis.
    """
    devices = jax.devices() if devices is None else devices
    slices: dict[int, list[jax.Device]] = {}
    for device in devices:
        number = getattr(device, "slice_index", 0) if device.platform == "tpu" else 0
        slices.setdefault(number, []).append(device)
    if len(slices) == 1:
        return axes.make_mesh(config, devices)
    if len(set(map(len, slices.values()))) > 1:
        counts = ", ".join(str(len(slices[number])) for number in sorted(slices))
        raise ValueError(f"mesh: slices must have as many devices each, not {counts}")
    sizes = {axis: getattr(config, axis) for axis in MESH_AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    free = [axis for axis, size in sizes.items() if size == -1]
    if free and len(devices) % fixed == 0:
        sizes[free[0]] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(
            f"mesh={sizes}: does not fit the {len(devices)} devices of {len(slices)} slices"
        )
    between = next((axis for axis in _BETWEEN if sizes[axis] % len(slices) == 0), None)
    if between is None:
        raise ValueError(
            f"mesh.data={sizes['data']} or mesh.fsdp={sizes['fsdp']}: one must be a multiple of "
            f"the {len(slices)} slices"
        )
    within = replace(config, **(sizes | {between: sizes[between] // len(slices)}))
    meshes = [axes.make_mesh(within, slices[number]) for number in sorted(slices)]
    grid = np.concatenate([mesh.devices for mesh in meshes], axis=MESH_AXES.index(between))
    return Mesh(grid, MESH_AXES, axis_types=meshes[0].axis_types)
