"""How processes are told of one another, and the rows that each feeds."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from dsjax.config import MeshConfig
from dsjax.mesh import make_mesh, train_rules
from dsjax.processes import HostShard, HostTimes, initialize_processes
from dsjax.processes import join as processes
from dsjax.processes.host_times import slow_hosts

pytestmark = pytest.mark.core

NAMES = (
    "JAX_COORDINATOR_ADDRESS",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
    "SLURM_STEP_NODELIST",
    "SLURM_NTASKS",
    "SLURM_STEP_TASKS_PER_NODE",
    "SLURM_GPUS_ON_NODE",
    "OMPI_COMM_WORLD_SIZE",
)


@pytest.fixture
def calls(monkeypatch) -> list:
    found: list = []
    monkeypatch.setattr(
        jax.distributed, "initialize", lambda *args, **kwargs: found.append((args, kwargs))
    )
    monkeypatch.setattr(processes, "_on_tpu_host", lambda: False)
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    return found


CASES = [
    ({}, None),
    ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "a"}, None),
    ({"SLURM_NTASKS": "8"}, None),  # in a batch script, not under srun
    (
        {
            "JAX_COORDINATOR_ADDRESS": "host:1",
            "JAX_NUM_PROCESSES": "4",
            "JAX_PROCESS_ID": "0",
            "SLURM_NTASKS": "8",
            "SLURM_STEP_NODELIST": "a",
        },
        (("host:1", 4, 0), {"cluster_detection_method": "deactivate"}),
    ),
    (
        {
            "SLURM_NTASKS": "16",
            "SLURM_STEP_NODELIST": "n[1-2]",
            "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
            "SLURM_GPUS_ON_NODE": "8",
        },
        ((), {"local_device_ids": None}),
    ),
    (
        {
            "SLURM_NTASKS": "2",
            "SLURM_STEP_NODELIST": "n[1-2]",
            "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
            "SLURM_GPUS_ON_NODE": "8",
        },
        ((), {"local_device_ids": list(range(8))}),
    ),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, ((), {})),
]


@pytest.mark.parametrize(("environment", "expected"), CASES)
def test_the_environment_describes_the_processes(calls, monkeypatch, environment, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    initialize_processes()
    assert calls == ([] if expected is None else [expected])


def test_half_a_description_names_what_is_missing(calls, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1")
    with pytest.raises(ValueError, match=r"^JAX_NUM_PROCESSES is not set: several processes need"):
        initialize_processes()
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    with pytest.raises(ValueError, match=r"^JAX_NUM_PROCESSES='two': must be a whole number$"):
        initialize_processes()


@dataclass(frozen=True)
class Device:
    """A device of some process."""

    id: int
    process_index: int


def shard_of(owners: list[int], process: int, monkeypatch, **axes: int) -> HostShard:
    """The shard of a process, where device i belongs to process owners[i]."""
    rules = train_rules(make_mesh(MeshConfig(**axes), jax.devices()[: len(owners)]))
    sharding = rules.sharding(None, "batch")
    assert sharding is not None
    assert rules.mesh is not None
    real = sharding.devices_indices_map((1, rules.num_batch_shards()))
    fake = {
        Device(device.id, owners[i]): real[device]
        for i, device in enumerate(rules.mesh.devices.flat)
    }
    stand_in = SimpleNamespace(devices_indices_map=lambda shape: fake)
    table = SimpleNamespace(
        mesh=rules.mesh,
        num_batch_shards=rules.num_batch_shards,
        num_shards=rules.num_shards,
        sharding=lambda *dims: stand_in,
    )
    monkeypatch.setattr(jax, "process_index", lambda: process)
    return HostShard(table)  # type: ignore[arg-type]


def test_processes_feed_different_rows(monkeypatch):
    for owners in ([0, 0, 1, 1], [0, 1, 0, 1], [1, 0, 0, 1]):
        shards = [shard_of(owners, p, monkeypatch, fsdp=4) for p in (0, 1)]
        assert sorted(s.index for s in shards) == [0, 1]
        assert [s.count for s in shards] == [2, 2]


def test_processes_along_a_tensor_axis_feed_the_same_rows(monkeypatch):
    owners = [0, 1, 0, 1, 2, 3, 2, 3]
    shards = [shard_of(owners, p, monkeypatch, fsdp=4, tensor=2) for p in range(4)]
    assert [(s.index, s.count) for s in shards] == [(0, 2), (0, 2), (1, 2), (1, 2)]


def test_rows_that_processes_share_in_part_are_refused(monkeypatch):
    owners = [0, 0, 1, 1, 0, 1]  # fsdp 3 by tensor 2: process 0 has rows 0 and 2, process 1 1 and 2
    with pytest.raises(ValueError, match="processes share some rows of the batch but not all"):
        shard_of(owners, 0, monkeypatch, fsdp=3, tensor=2)


def test_one_process_places_rows_on_its_mesh():
    rules = train_rules(make_mesh(MeshConfig(), jax.devices()[:4]))
    shard = HostShard(rules)
    assert (shard.index, shard.count) == (0, 1)
    rows = np.arange(16 * 3).reshape(16, 3)
    placed = shard.place({"tokens": rows, "num_bytes": np.arange(16)}, num_slices=2)
    np.testing.assert_array_equal(placed["tokens"], rows.reshape(2, 8, 3))
    np.testing.assert_array_equal(placed["num_bytes"], np.arange(16).reshape(2, 8))
    assert {s.data.shape for s in placed["tokens"].addressable_shards} == {(2, 2, 3)}


def test_rows_that_devices_divide_are_striped():
    mesh = make_mesh(MeshConfig(fsdp=2, context=4), jax.devices()[:8])
    rules = train_rules(mesh)
    rows = np.arange(2 * 12).reshape(2, 12)
    placed = HostShard(rules).place({"tokens": rows, "num_bytes": np.arange(2)}, num_slices=1)
    for part in placed["tokens"].addressable_shards:
        place = np.argwhere(mesh.devices.squeeze() == part.device)[0]
        np.testing.assert_array_equal(part.data[0], rows[place[:1], place[1] :: 4])


def test_a_process_places_the_stripes_of_its_own_devices(monkeypatch):
    """Two processes along the axis that divides rows: both read the rows, each places a half."""
    mesh = make_mesh(MeshConfig(fsdp=2, context=4), jax.devices()[:8])
    rules = train_rules(mesh)
    rows = np.arange(2 * 12).reshape(2, 12)
    devices = mesh.devices.squeeze()
    found = []

    def place(sharding, local):
        found.append(local)

    monkeypatch.setattr(jax, "make_array_from_process_local_data", place)
    for process in range(2):
        shard: Any = HostShard(rules)
        own = set(devices[:, 2 * process : 2 * process + 2].flat)
        of_all = shard._sharding.devices_indices_map
        shard._sharding = SimpleNamespace(
            num_devices=8,
            addressable_devices_indices_map=lambda shape, own=own, of_all=of_all: {
                device: index for device, index in of_all(shape).items() if device in own
            },
        )
        shard.place({"tokens": rows}, num_slices=1)
    for process, local in enumerate(found):
        stripes = [rows[:, 2 * process + i :: 4] for i in range(2)]
        np.testing.assert_array_equal(local[0], np.concatenate(stripes, axis=1))


def test_a_slow_host_is_named_by_what_it_alone_takes():
    said: dict[int, dict] = {
        i: {"host": f"node-{i}", "input_seconds": 0.01, "probe_seconds": 0.5} for i in range(4)
    }
    assert slow_hosts(said, step_seconds=1.0, share=0.1) == {}
    said[2]["input_seconds"] = 0.2
    said[3]["probe_seconds"] = 0.56
    said[1]["probe_seconds"] = None  # has not told yet
    assert slow_hosts(said, step_seconds=1.0, share=0.1) == {
        "process 2 (host node-2)": "process 2 (host node-2): reading its rows takes 0.2 s, "
        "the median host's 0.01 s",
        "process 3 (host node-3)": "process 3 (host node-3): the same computation takes its "
        "devices 0.56 s, the median host's 0.5 s",
    }
    said[2]["input_seconds"] = 0.1  # of a step of a second that is within the tenth
    assert "process 2 (host node-2)" not in slow_hosts(said, step_seconds=1.0, share=0.1)
    assert slow_hosts({0: said[3]}, 1.0, 0.1) == {}  # alone, nobody is slow


def test_the_first_process_says_a_slow_host_once():
    lines: list[str] = []
    times = HostTimes(0.1, lines.append)
    other = {"host": "node-1", "input_seconds": 0.5}
    heartbeat: Any = SimpleNamespace(
        index=0,
        own={},
        tell=lambda **told: heartbeat.own.update(told),
        others=lambda: {0: {"host": "node-0"} | heartbeat.own, 1: other},
    )
    with times.own_work():
        pass
    found = times.figures(heartbeat, None, step_seconds=1.0)
    assert found["input_seconds"] < 0.01
    assert [line.partition(":")[0] for line in found["slow_hosts"]] == ["process 1 (host node-1)"]
    assert times.figures(heartbeat, None, step_seconds=1.0)["slow_hosts"]
    assert len(lines) == 1
    other["input_seconds"] = 0.0
    assert "slow_hosts" not in times.figures(heartbeat, None, step_seconds=1.0)
