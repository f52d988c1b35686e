"""How the processes of a run find one another."""

from __future__ import annotations

import glob
import importlib.util
import logging
import os

import jax

_LOG = logging.getLogger(__name__)

_DESCRIPTION = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def initialize_processes() -> None:
    """Joins the other processes of the run, as the environment describes them.

    The first that applies decides:

    - `JAX_COORDINATOR_ADDRESS` (host:port of process 0), `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`:
      any machines; a Kubernetes JobSet sets the last from its job's index.
    - SLURM, under `srun` with several tasks: one task per GPU, or one per node, which then takes
      all of the node's GPUs.
    - Open MPI's `mpirun` with several processes.
    - TPU hosts, alone or in a pod, of Cloud TPU or GKE.

    A machine by itself needs none of these. Processes that have joined stay as they are.

    Raises:
        ValueError: one of the three JAX variables is missing or no number.
        RuntimeError: JAX was used before, so that it is too late to join.
    """
    env = os.environ
    if jax.distributed.is_initialized():
        return
    if any(name in env for name in _DESCRIPTION):
        address, count, index = (_described(name) for name in _DESCRIPTION)
        jax.distributed.initialize(
            address,
            _number("JAX_NUM_PROCESSES", count),
            _number("JAX_PROCESS_ID", index),
            cluster_detection_method="deactivate",
        )
    elif "SLURM_STEP_NODELIST" in env and int(env.get("SLURM_NTASKS", "1")) > 1:
        jax.distributed.initialize(local_device_ids=_slurm_devices())
    elif int(env.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        jax.distributed.initialize()
    elif _on_tpu_host():
        try:
            jax.distributed.initialize()
        except (ValueError, RuntimeError) as error:  # JAX finds no pod, or was used before
            if isinstance(error, RuntimeError) and jax.process_count() > 1:
                raise
            _LOG.info("a TPU host by itself: %s", error)
            return
    else:
        return
    _LOG.info("process %d of %d", jax.process_index(), jax.process_count())


def _described(name: str) -> str:
    if name not in os.environ:
        raise ValueError(f"{name} is not set: several processes need {', '.join(_DESCRIPTION)}")
    return os.environ[name]


def _number(name: str, text: str) -> int:
    if not text.isdigit():
        raise ValueError(f"{name}={text!r}: must be a whole number")
    return int(text)


def _slurm_devices() -> list[int] | None:
    """Returns all of a node's GPUs where a task has the node to itself; JAX would take one."""
    alone = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").partition("(")[0] == "1"
    gpus = os.environ.get("SLURM_GPUS_ON_NODE", "")
    return list(range(int(gpus))) if alone and gpus.isdigit() else None


def _on_tpu_host() -> bool:
    chips = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    wanted = os.environ.get("JAX_PLATFORMS", "tpu").split(",")
    return bool(chips) and "tpu" in wanted and importlib.util.find_spec("libtpu") is not None
