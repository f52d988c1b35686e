"""Looks for silent corruption: numbers that are wrong and that nothing has reported.

Three checks, which find different things (`docs/reliability.md` says which):

- a checksum of every shard of all that a step changes, compared between devices that hold the same
  shard, and with itself when the next step begins;
- one gradient computed twice, which must come out the same bit by bit;
- one small computation on every device, which must come out the same on all, and as it did before.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsjax.config import ChecksConfig, LossConfig
from dsjax.model import DeepSeekV2
from dsjax.training.dropping import draw_exempt
from dsjax.training.losses import Batch
from dsjax.training.optimizer import divide, random_bits
from dsjax.training.step import TrainState, accumulate_gradients

_PRODUCTS = 8  # of the computation that every device makes


class SilentCorruption(RuntimeError):
    """A device, or its memory, gives wrong numbers and says nothing; names its host."""


class Checks:
    """A run's checks for silent corruption, made together by all of its processes."""

    def __init__(
        self,
        config: ChecksConfig,
        mesh: Mesh,
        hosts: Sequence[str],
        say: Callable[[str], None],
    ):
        """Prepares the checks.

        Args:
            config: when they are made.
            mesh: the run's devices.
            hosts: names of the machines of processes 0, 1, ….
            say: takes a line for the user.
        """
        self._config, self._mesh, self._hosts, self._say = config, mesh, hosts, say
        self._devices = list(mesh.devices.flat)
        self._has_replicas = dict(mesh.shape).get("data", 1) > 1
        self._began, self._spent = time.monotonic(), 0.0
        self._costs: dict[str, float] = {}  # seconds of each kind, when it was made last
        self._before: np.ndarray | None = None  # checksums after the last update
        self._probe_result: np.ndarray | None = None
        self._repeats = True
        self.probe_seconds: float | None = None

    def is_due(self, kind: str, step: int) -> bool:
        """Tells whether a check is due after so many steps; the same on every process.

        Args:
            kind: "state" or "repeat".
            step: steps taken.
        """
        every = {"state": self._config.state_every, "repeat": self._config.repeat_every}[kind]
        if not every or step == 0 or step % every:
            return False
        if kind == "repeat" and not self._repeats:
            return False
        elapsed = time.monotonic() - self._began
        fits = self._spent + self._costs.get(kind, 0.0) <= self._config.max_share * elapsed
        if jax.process_count() > 1:  # the first one's clock decides
            fits = bool(multihost_utils.broadcast_one_to_all(np.array(fits)))
        return fits

    @property
    def share(self) -> float:
        """The share of the run's time that the checks have taken, their compilation left out."""
        return self._spent / max(time.monotonic() - self._began, 1e-9)

    @property
    def has_unconfirmed(self) -> bool:
        """Whether `before_update` has something to compare."""
        return self._before is not None

    def after_update(self, state: TrainState, step: int) -> None:
        """Takes the checksums of a state, and compares those of devices with the same shards.

        Raises:
            SilentCorruption: they differ.
        """
        sums_DL = self._timed("state", lambda: self._checksums(state))
        for column, (name, leaf) in enumerate(_arrays(state)):
            for group in _replica_groups(leaf, self._mesh):
                self._require_equal(sums_DL[group, column], group, f"step {step}: {name}")
        self._before = None if self._has_replicas else sums_DL

    def before_update(self, state: TrainState, step: int) -> None:
        """Compares a state with what it was after its update, where no replica can vouch for it.

        Raises:
            SilentCorruption: it has changed since.
        """
        if self._before is None:
            return
        before, self._before = self._before, None
        after = self._timed("state", lambda: self._checksums(state), add=True)
        changed = np.argwhere(before != after)
        if len(changed):
            device, column = (int(i) for i in changed[0])
            name = _arrays(state)[column][0]
            raise SilentCorruption(
                f"step {step}: {name} changed in the memory of {self._names([device])} while no "
                f"step ran{_and_more(len(changed) - 1)}"
            )

    def repeat(
        self,
        graphdef: nnx.GraphDef[DeepSeekV2],
        loss: LossConfig,
        state: TrainState,
        batch: Batch,
        step: int,
    ) -> None:
        """Computes one thing on every device, and the next step's gradient twice.

        Where four gradients are all different, the compiled program itself does not repeat, as
        scatters with atomic additions on a GPU do not: that is said, and the check is left out.

        Raises:
            SilentCorruption: results differ.
        """
        self._timed("repeat", lambda: self._probe(step))
        if not self._repeats:
            return
        trained, frozen = divide(state.params, state.moments)
        arrays = _arrays_of("gradient", trained)
        specs = tuple(_spec(leaf) for _, leaf in arrays)

        def once() -> np.ndarray:
            return self._gathered(
                gradient_checksums(
                    graphdef, loss, self._mesh, specs, trained, state.step, batch, frozen
                )
            )

        first, second = self._timed("repeat", lambda: (once(), once()), add=True)
        if np.array_equal(first, second):
            return
        further = [once(), once()]
        results = [first, second, *further]
        repeated = any(np.array_equal(a, b) for i, a in enumerate(results) for b in results[:i])
        if not repeated:
            self._repeats = False
            self._say(
                f"step {step}: a gradient computed four times came out differently each time: this "
                "platform's program does not repeat, so repetitions cannot tell faults; left out"
            )
            return
        device, column = (int(i) for i in np.argwhere(first != second)[0])
        name = arrays[column][0]
        raise SilentCorruption(
            f"step {step}: {name} on {self._names([device])} came out differently when it was "
            "computed again: some device computes wrongly, this one or one that it adds up with"
        )

    def _probe(self, step: int) -> None:
        size = 256 if self._devices[0].platform == "cpu" else 2048
        matrix = np.random.default_rng(0).standard_normal((size, size), np.float32)
        given = jax.device_put(matrix, NamedSharding(self._mesh, PartitionSpec()))
        began = time.monotonic()
        result = jax.block_until_ready(_probe_devices(self._mesh, given))
        self.probe_seconds = time.monotonic() - began  # this host's own: nothing was waited for
        found = self._gathered(result)
        everyone = np.arange(len(self._devices))
        what = f"step {step}: the same computation"
        self._require_equal(found[:, 0], everyone, what)
        if self._probe_result is not None:
            changed = np.flatnonzero(found[:, 0] != self._probe_result[:, 0])
            if len(changed):
                raise SilentCorruption(
                    f"{what} came out differently than before on {self._names(list(changed))}"
                )
        self._probe_result = found

    def _checksums(self, state: TrainState) -> np.ndarray:
        arrays = _arrays(state)
        specs = tuple(_spec(leaf) for _, leaf in arrays)
        return self._gathered(checksums(self._mesh, specs, [leaf for _, leaf in arrays]))

    def _gathered(self, array: jax.Array) -> np.ndarray:
        if jax.process_count() == 1:
            return np.asarray(array)
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))

    def _timed[T](self, kind: str, body: Callable[[], T], add: bool = False) -> T:
        """Runs a check and counts its time; the first time it compiles, which does not count."""
        began = time.monotonic()
        result = body()
        key = f"{kind}+" if add else kind
        if key in self._costs:
            seconds = time.monotonic() - began
            self._spent += seconds
            self._costs[key] = seconds
        else:
            self._costs[key] = 0.0
        return result

    def _require_equal(self, sums: np.ndarray, devices: np.ndarray, what: str) -> None:
        """Refuses checksums that differ, and names those in the minority, or all."""
        values, counts = np.unique(sums, return_counts=True)
        if len(values) == 1:
            return
        most = int(counts.argmax())
        if 2 * counts[most] > len(sums):
            wrong = [int(d) for d in devices[sums != values[most]]]
            raise SilentCorruption(
                f"{what} on {self._names(wrong)} is not what {counts[most]} other devices have"
            )
        raise SilentCorruption(
            f"{what} differs between {self._names([int(d) for d in devices])}, one of which is "
            "wrong; which one cannot be told from these"
        )

    def _names(self, devices: Sequence[int]) -> str:
        named = []
        for number in devices[:4]:
            device = self._devices[number]
            host = self._hosts[device.process_index]
            named.append(f"device {device.id} of process {device.process_index} (host {host})")
        return ", ".join(named) + _and_more(len(devices) - 4)


def _and_more(count: int) -> str:
    return f", and {count} more" if count > 0 else ""


def _arrays_of(prefix: str, tree: Any) -> list[tuple[str, jax.Array]]:
    """Returns the arrays of a tree with their names."""
    named = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
        named.append((f"{prefix}.{name}", leaf))
    return named


def _arrays(state: TrainState) -> list[tuple[str, jax.Array]]:
    """Returns what a step changes, but for scalars of the guard."""
    return _arrays_of("params", state.params) + _arrays_of("moments", state.moments)


def _spec(array: jax.Array) -> PartitionSpec:
    sharding = array.sharding
    return sharding.spec if isinstance(sharding, NamedSharding) else PartitionSpec()


def _replica_groups(array: jax.Array, mesh: Mesh) -> list[np.ndarray]:
    """Returns the devices, by their place in the mesh, that hold the same shard of an array."""
    used = {axis for entry in _spec(array) for axis in _axes_of(entry)}
    shard = np.zeros(mesh.devices.shape, np.int64)
    for place, axis in zip(np.indices(mesh.devices.shape), mesh.axis_names, strict=True):
        if axis in used:
            shard = shard * mesh.shape[axis] + place
    flat = shard.reshape(-1)
    return [np.flatnonzero(flat == number) for number in np.unique(flat)]


def _axes_of(entry: Any) -> tuple[str, ...]:
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


@functools.partial(jax.jit, static_argnums=(0, 1))
def checksums(mesh: Mesh, specs: tuple[PartitionSpec, ...], arrays: list[jax.Array]) -> jax.Array:
    """Returns uint32 [devices, arrays]: of each device's shard of each array, divided by device.

    An element's bits are multiplied by an odd number that is hashed from its place, and added up
    modulo 2**32. So a change of one bit always changes the sum, and one of several bits does but
    for one case in 2**32; elements that change places are found too.
    """
    return _on_each_device(mesh, specs, arrays)


def _on_each_device(
    mesh: Mesh, specs: tuple[PartitionSpec, ...], arrays: list[jax.Array]
) -> jax.Array:
    def local(*shards: jax.Array) -> jax.Array:
        return jnp.stack([_checksum(shard) for shard in shards])[None]

    if mesh.size == 1:
        return local(*arrays)
    out = PartitionSpec(mesh.axis_names)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
    return mapped(*arrays)


def _checksum(shard: jax.Array) -> jax.Array:
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[shard.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(shard, width).astype(jnp.uint32)
    return jnp.sum(bits * (random_bits(jnp.uint32(1), shard.shape) | 1), dtype=jnp.uint32)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def gradient_checksums(
    graphdef: nnx.GraphDef[DeepSeekV2],
    loss: LossConfig,
    mesh: Mesh,
    specs: tuple[PartitionSpec, ...],
    params: nnx.State,
    step: jax.Array,
    batch: Batch,
    frozen: nnx.State | None,
) -> jax.Array:
    """Returns the checksums of a batch's gradient, which goes to where its parameters are."""
    if loss.dropping is not None:
        exempt_AB = draw_exempt(loss.dropping, step, batch["tokens"].shape[:2])
        batch = batch | {"exempt": exempt_AB}
    gradients, _ = accumulate_gradients(graphdef, loss, params, batch, frozen)
    arrays = jax.tree.leaves(gradients)
    if mesh.size > 1:
        arrays = [
            jax.lax.with_sharding_constraint(array, NamedSharding(mesh, spec))
            for array, spec in zip(arrays, specs, strict=True)
        ]
    return _on_each_device(mesh, specs, arrays)


@functools.partial(jax.jit, static_argnums=0)
def _probe_devices(mesh: Mesh, matrix: jax.Array) -> jax.Array:
    """Multiplies and squashes a matrix some times on every device: uint32 [devices, 1]."""

    def local(matrix: jax.Array) -> jax.Array:
        narrow = matrix.astype(jnp.bfloat16)

        def again(_: int, x: jax.Array) -> jax.Array:
            product = jnp.dot(x, narrow, preferred_element_type=jnp.float32)
            return jnp.tanh(product / jnp.sqrt(x.shape[0])).astype(jnp.bfloat16)

        return _checksum(jax.lax.fori_loop(0, _PRODUCTS, again, narrow))[None, None]

    if mesh.size == 1:
        return local(matrix)
    out = PartitionSpec(mesh.axis_names)
    return jax.shard_map(
        local, mesh=mesh, in_specs=PartitionSpec(), out_specs=out, check_vma=False
    )(matrix)
