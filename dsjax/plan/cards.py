"""The plan of a run's training step on NVIDIA cards that are not here: what it takes of them.

XLA compiles for a card that it is told of, kernels and all, so the memory of a step is known before
the card is. Times are not: the vendor's libraries choose how they multiply when they see a card.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from dsjax.config import TrainConfig
from dsjax.mesh import make_mesh
from dsjax.plan.collectives import count_collectives
from dsjax.plan.expected import without_further_passes
from dsjax.plan.figures import does_not_fit
from dsjax.plan.lower import lower_run
from dsjax.plan.program import Program
from dsjax.plan.state import state_kinds, step_figures
from dsjax.xla_options import compiler_options


@dataclass(frozen=True)
class Card:
    """What XLA must know of a card to compile for it.

    Attributes:
        kind: its name, as its driver says it.
        memory: bytes, as CUDA says them.
        memory_bandwidth: bytes a second, the vendor's data sheet.
        clock_ghz: its highest.
    """

    kind: str
    memory: int
    memory_bandwidth: float
    clock_ghz: float = 1.98


# Of SXM boards; what they have in common is in `_TARGET`.
CARDS = {
    "h100": Card("NVIDIA H100 80GB HBM3", 84_942_979_072, 3352e9),
    "h200": Card("NVIDIA H200", 150_110_011_392, 4800e9),
}
# What a process is given of a card: XLA_PYTHON_CLIENT_MEM_FRACTION, whose default is 0.75.
_OF_CARD = 0.95
# Multiprocessors and their limits: NVIDIA's Hopper tuning guide, and the CUDA programming guide's
# table of compute capability 9.0.
_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  core_count: 132
  fpus_per_core: 128
  l2_cache_size: 52428800
  clock_rate_ghz: {card.clock_ghz}
  memory_bandwidth: {card.memory_bandwidth:.0f}
  device_memory_size: {card.memory}
  device_address_bits: 64
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  name: "{card.kind}"
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{card.kind}"
"""
# To sort, XLA asks a library for its room, which asks the card; so it sorts by itself here.
_OPTIONS = {"xla_gpu_enable_cub_radix_sort": False}


def is_cards(topology: str) -> bool:
    """Whether a topology's name is of cards, like "h100:8", and not of TPUs."""
    return topology.partition(":")[0] in CARDS


def card_devices(topology: str) -> list[jax.Device]:
    """Returns cards to compile for, on a host that need have none.

    From here on the process runs on its CPU alone. It needs JAX's plugin for CUDA (`dsjax[cuda]`).

    Args:
        topology: a card and how many of one host, like "h100:8".

    Raises:
        ValueError: an unknown card or number, or there is no plugin.
    """
    name, _, number = topology.partition(":")
    if name not in CARDS or not re.fullmatch(r"[1-9]\d*", number):
        raise ValueError(f"topology {topology!r}: must be one of {', '.join(CARDS)}, ':', a number")
    jax.config.update("jax_platforms", "cpu")
    target = _TARGET.format(card=CARDS[name])
    try:
        found = topologies.get_topology_desc(
            platform="cuda", target_config=target, topology=f"1x1x{number}"
        )
    except (jax.errors.JaxRuntimeError, NotImplementedError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"topology {topology!r}: needs JAX's plugin for CUDA (pip install 'dsjax[cuda]'), "
            f"no card: {first}"
        ) from None
    return list(found.devices)


def plan_on_cards(run: TrainConfig, topology: str) -> dict[str, Any]:
    """Compiles a run's step for cards and returns what it needs of one, ready for JSON.

    Args:
        run: the run; its data is not looked at.
        topology: as of `card_devices`.

    Returns:
        Bytes and FLOPs of one card and step, named as in `plan_training`, without times. The
        capacity is 0.95 of the card's memory.

    Raises:
        ValueError: an unknown topology, a mesh or batch that does not divide, or a step that does
            not fit; names the largest arrays.
    """
    mesh = make_mesh(run.mesh, card_devices(topology))
    devices = list(mesh.devices.flat)
    began = time.perf_counter()
    lowered = lower_run(run, devices)
    kinds = state_kinds(run, mesh)
    compiled = lowered.compile(compiler_options={**compiler_options("gpu"), **_OPTIONS})
    seconds = time.perf_counter() - began
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None
    assert text is not None
    capacity = int(_OF_CARD * CARDS[topology.partition(":")[0]].memory)
    peak = memory.peak_memory_in_bytes
    if peak > capacity:
        much = f"needs {peak / 2**30:.1f} GiB of {capacity / 2**30:.1f}"
        raise ValueError(does_not_fit(f"a card of {topology}", much, kinds))
    axes = dict(mesh.shape)
    program = without_further_passes(Program.of(text))
    uses = count_collectives(program, axes, run.runtime.kernels.exchange_room)
    return {
        "topology": topology,
        "slices": 1,
        "chips": len(devices),
        "mesh": axes,
        "peak_bytes": peak,
        "capacity_bytes": capacity,
        **step_figures(run, mesh, kinds, peak),
        "collective_bytes": sum(use.expected_bytes for use in uses.values()),
        "collectives": {
            name: {"executions": use.executions, "expected_bytes": use.expected_bytes}
            for name, use in uses.items()
        },
        "compile_seconds": seconds,
    }
