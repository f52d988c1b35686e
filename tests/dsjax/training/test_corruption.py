"""Silent corruption is found, and its device and host are named."""

import ctypes
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dsjax.config import ChecksConfig, MeshConfig
from dsjax.mesh import make_mesh
from dsjax.training import corruption, loop
from dsjax.training.corruption import Checks, SilentCorruption, checksums
from dsjax.training.saving import Saver
from tests.dsjax.training.small_runs import losses, small_run

ALWAYS = ChecksConfig(state_every=1, repeat_every=2, max_share=1.0)


def flip_bit(array: jax.Array, device: int, element: int = 0, bit: int = 3) -> None:
    """Flips one bit in one device's memory, behind JAX's back."""
    (shard,) = [s.data for s in array.addressable_shards if s.device.id == device]
    size = shard.dtype.itemsize
    place = shard.unsafe_buffer_pointer() + element * size
    ctypes.c_uint8.from_address(place + bit // 8).value ^= 1 << (bit % 8)


@pytest.mark.core
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
def test_every_single_bit_changes_its_devices_checksum_alone(dtype):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2), jax.devices()[:4])
    values = np.random.default_rng(0).standard_normal((4, 6)) * 100
    specs = (PartitionSpec("fsdp"),)
    # Replicas that `device_put` makes may share their memory.
    copy = jax.jit(lambda x: x + 0, out_shardings=NamedSharding(mesh, specs[0]))
    before = None
    for bit in range(jnp.dtype(dtype).itemsize * 8):
        array = copy(values.astype(dtype))
        clean = np.asarray(checksums(mesh, specs, [array]))
        assert before is None or np.array_equal(before, clean)
        before = clean
        device = mesh.devices.flat[2].id
        flip_bit(array, device, element=7, bit=bit)
        changed = np.asarray(checksums(mesh, specs, [array])) != clean
        assert changed[:, 0].tolist() == [False, False, True, False]


def run_with_a_flip(
    tmp_path: Path, corpus: Path, monkeypatch, mesh: MeshConfig, name: str, device: int
) -> None:
    """Trains with a checkpoint at step 2, during whose save one bit flips."""
    save = Saver.save

    def flipping(self: Saver, step: int, state: Any, data_state: Any) -> None:
        save(self, step, state, data_state)
        arrays = dict(corruption._arrays(state))
        flip_bit(arrays[name], device)

    monkeypatch.setattr(Saver, "save", flipping)
    config = small_run(tmp_path / "run", corpus, mesh=mesh, checks=ALWAYS)
    loop.fit(replace(config, checkpoint=replace(config.checkpoint, every=2)))


NORM = "params.norm.weight"


def test_a_bit_that_flips_in_a_replica_is_found(tmp_path: Path, corpus: Path, monkeypatch):
    with pytest.raises(SilentCorruption) as found:
        run_with_a_flip(tmp_path, corpus, monkeypatch, MeshConfig(data=2), NORM, device=3)
    message = str(found.value)
    assert message.startswith(f"step 3: {NORM} on device 3 of process 0 (host ")
    assert message.endswith("is not what 7 other devices have")
    assert list(losses(tmp_path / "run"))[-1] <= 3


def test_a_bit_that_flips_where_there_is_no_replica_is_found(
    tmp_path: Path, corpus: Path, monkeypatch
):
    name = "params.embed.weight"
    with pytest.raises(SilentCorruption) as found:
        run_with_a_flip(tmp_path, corpus, monkeypatch, MeshConfig(), name, device=5)
    message = str(found.value)
    assert message.startswith(f"step 2: {name} changed in the memory of device 5 of process 0")
    assert message.endswith("while no step ran")


def test_two_that_differ_are_both_named():
    mesh = make_mesh(MeshConfig(data=2), jax.devices()[:2])
    checks = Checks(ALWAYS, mesh, ["a-host"], print)
    with pytest.raises(SilentCorruption, match=r"w differs between device 0 .*, device 1 .*a-host"):
        checks._require_equal(np.array([1, 2]), np.array([0, 1]), "w")


@pytest.fixture
def gradients(monkeypatch) -> list[np.ndarray]:
    """What the next computations of a gradient come to."""
    coming: list[np.ndarray] = []
    monkeypatch.setattr(corruption, "gradient_checksums", lambda *_: coming.pop(0))
    monkeypatch.setattr(corruption, "divide", lambda *_: (None, None))
    monkeypatch.setattr(corruption, "_arrays_of", lambda *_: [("gradient.w", jnp.zeros(2))])
    return coming


def sums(*values: int) -> np.ndarray:
    return np.array(values, np.uint32)[:, None]


class State:
    """Stands in for a TrainState."""

    params = moments = step = None


def test_a_gradient_that_comes_out_differently_once_is_a_fault(gradients):
    said: list[str] = []
    checks = Checks(ALWAYS, make_mesh(MeshConfig(), jax.devices()[:2]), ["a-host"], said.append)
    state: Any = State()
    gradients += [sums(1, 2), sums(1, 2)]
    checks.repeat(None, None, state, {}, 1)  # type: ignore[arg-type]
    gradients += [sums(1, 2), sums(1, 3), sums(1, 2), sums(1, 2)]
    with pytest.raises(SilentCorruption, match=r"step 2: gradient.w on device 1 .*\(host a-host\)"):
        checks.repeat(None, None, state, {}, 2)  # type: ignore[arg-type]
    gradients += [sums(1, 2), sums(1, 3), sums(1, 4), sums(1, 5)]
    checks.repeat(None, None, state, {}, 3)  # type: ignore[arg-type]
    assert "does not repeat" in said[0]
    assert not checks.is_due("repeat", 4)


def test_a_device_that_computes_otherwise_is_named(gradients, monkeypatch):
    checks = Checks(ALWAYS, make_mesh(MeshConfig(), jax.devices()[:4]), ["a-host"], print)
    monkeypatch.setattr(corruption, "_probe_devices", lambda *_: sums(5, 5, 6, 5))
    with pytest.raises(SilentCorruption, match=r"the same computation on device 2 .*3 other"):
        checks.repeat(None, None, State(), {}, 2)  # type: ignore[arg-type]
    one = Checks(ALWAYS, make_mesh(MeshConfig(), jax.devices()[:1]), ["a-host"], print)
    results = [sums(5), sums(6)]
    monkeypatch.setattr(corruption, "_probe_devices", lambda *_: results.pop(0))
    gradients += [sums(1), sums(1)]
    one.repeat(None, None, State(), {}, 2)  # type: ignore[arg-type]
    with pytest.raises(SilentCorruption, match="differently than before on device 0"):
        one.repeat(None, None, State(), {}, 4)  # type: ignore[arg-type]


def test_checks_keep_to_their_share_of_the_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(corruption.time, "monotonic", lambda: now[0])
    config = ChecksConfig(state_every=10, max_share=0.01)
    checks = Checks(config, make_mesh(MeshConfig(), jax.devices()[:1]), ["a"], print)

    def check() -> None:
        now[0] += 0.5

    checks._timed("state", check)  # compiles, which does not count
    made = 0
    for step in range(10, 1001, 10):
        now[0] += 10
        if checks.is_due("state", step):
            checks._timed("state", check)
            made += 1
    assert 10 < made < 30  # of 100: half a second is due once in 50
    assert checks.share <= 0.01
    assert not checks.is_due("state", 11)
    assert not Checks(replace(config, state_every=0), checks._mesh, ["a"], print).is_due("state", 0)


def test_a_sound_run_is_not_disturbed(tmp_path: Path, corpus: Path):
    plain = small_run(tmp_path / "plain", corpus)
    checked = replace(plain, directory=str(tmp_path / "checked"), checks=ALWAYS)
    for config in (plain, checked):
        loop.fit(config, devices=jax.devices()[:2])
    assert losses(tmp_path / "plain") == losses(tmp_path / "checked")
