"""Meshes over several slices, laid out by libtpu's own description of the chips."""

import json
import subprocess
import sys

from tests.conftest import require_module

# Prints, of each mesh, which axes have chips of both slices, or what is wrong with it.
PROGRAM = """
import json, sys
import numpy as np
from dsjax.config import MeshConfig
from dsjax.mesh import make_mesh
from dsjax.plan import tpu_devices
devices = tpu_devices("v5e:2x4", 2)
for sizes in json.loads(sys.argv[1]):
    try:
        mesh = make_mesh(MeshConfig(**sizes), devices)
    except ValueError as error:
        print(json.dumps(str(error)))
        continue
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    crossed = [
        axis for dim, axis in enumerate(mesh.axis_names) if np.ptp(slices, axis=dim).any()
    ]
    ids = [device.id + 1000 * device.slice_index for device in mesh.devices.flat]
    print(json.dumps([crossed, len(set(ids)), dict(mesh.shape)]))
"""


def test_slices_lie_along_data_or_else_fsdp():
    require_module("libtpu")
    meshes = (
        {"data": 2, "fsdp": 2, "expert": 4},
        {"fsdp": -1, "expert": 4},
        {"data": -1, "fsdp": 1, "tensor": 2},
        {"data": 1, "fsdp": 1, "expert": 8, "tensor": 2},
        {"data": 2, "fsdp": 2, "expert": 2},
        {"fsdp": -1, "expert": 3},
        {"fsdp": -1, "expert": 32},
    )
    command = [sys.executable, "-c", PROGRAM, json.dumps(meshes)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    *found, none, few, three, many = (json.loads(line) for line in ended.stdout.splitlines())
    shape = {"data": 1, "fsdp": 1, "expert": 1, "context": 1, "tensor": 1}
    assert found == [
        [["data"], 16, shape | meshes[0]],
        [["fsdp"], 16, shape | {"fsdp": 4, "expert": 4}],
        [["data"], 16, shape | {"data": 8, "tensor": 2}],
    ]
    assert none == "mesh.data=1 or mesh.fsdp=1: one must be a multiple of the 2 slices"
    for said, sizes in zip((few, three, many), meshes[-3:], strict=True):
        assert said == f"mesh={shape | sizes}: does not fit the 16 devices of 2 slices"
