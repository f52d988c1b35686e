"""The chips of a TPU topology that is not here."""

from __future__ import annotations

import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

_CHIPS_OF_A_HOST = 4
# libtpu is to compile, not to look for a TPU.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}


def tpu_devices(topology: str, num_slices: int = 1) -> list[jax.Device]:
    """Returns chips to compile for, on a host without a TPU.

    From here on the process runs on its CPU alone and without XLA_FLAGS, which libtpu would read
    too. So it must be called before jax has run anything. It needs libtpu (`dsjax[tpu]`).

    Args:
        topology: libtpu's name of it, like "v5p:4x4x4".
        num_slices: pods of it.

    Raises:
        ValueError: libtpu knows no such topology.
    """
    jax.config.update("jax_platforms", "cpu")
    os.environ.pop("XLA_FLAGS", None)
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    more: dict[str, Any] = {"num_slices": num_slices} if num_slices > 1 else {}
    sizes = [int(size) for size in re.findall(r"\d+", topology.partition(":")[2])]
    if sizes and math.prod(sizes) < _CHIPS_OF_A_HOST:  # part of a host, as "v5e:1x1" is
        more["chips_per_host_bounds"] = (*sizes, 1, 1)[:3]
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology, **more)
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"topology {topology!r}: libtpu does not know it: {first}") from None
    return list(described.devices)
