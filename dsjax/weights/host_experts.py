"""Routed experts that stay in the host's memory, as a model whose device cannot hold them has them.

The rest of the model is as any other, with arrays of no experts in the place of its routed ones.
The host keeps every expert as one run of bytes (`ExpertLayout`), in memory that the device copies
from by itself. XLA's pool of such memory on a GPU is limited; `XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB`
raises the limit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import SingleDeviceSharding

from dsjax.families.tensors import Path
from dsjax.layers.moe import MoE
from dsjax.layers.moe.packed import MATRICES, ExpertLayout
from dsjax.mesh import ShardingRules
from dsjax.model import DeepSeekV2
from dsjax.progress import JobProgress

_PREFIX = ("moe_layers", "feed_forward")
# Of the device's memory, for weights: the rest holds latents and what a step computes.
_SHARE_OF_WEIGHTS = 0.8
_READ_BYTES = 256 << 20  # of a layer's experts that are read at once, as NumPy has them
_PINNED = "pinned_host"


@dataclass
class ExpertTraffic:
    """What experts were asked for, and what was copied for them.

    Attributes:
        wanted: experts that layers asked for.
        hits: of these, those that the device had.
        foreseen: of the hits, those copied because the router before had foreseen them.
        guessed: experts copied for that reason, wanted afterwards or not.
        copied: experts copied to the device.
        copied_bytes: bytes of these.
    """

    wanted: int = 0
    hits: int = 0
    foreseen: int = 0
    guessed: int = 0
    copied: int = 0
    copied_bytes: int = 0

    def __str__(self) -> str:
        rate = self.hits / max(self.wanted, 1)
        return (
            f"experts: {self.wanted:,} wanted, {rate:.1%} were on the device ({self.foreseen:,} "
            f"foreseen, of {self.guessed:,} guesses); {self.copied:,} copied, "
            f"{self.copied_bytes / 1e9:.2f} GB"
        )


@dataclass(frozen=True)
class HostExperts:
    """The routed experts of a model, in the host's memory.

    Attributes:
        layout: what an expert's bytes mean.
        packed: uint8 [layout.num_bytes] of each expert of each layer.
        device_memory: bytes of the device that the model may take, or None for all.
        traffic: counted by the engines that use them.
    """

    layout: ExpertLayout
    packed: Sequence[Sequence[jax.Array]]
    device_memory: int | None = None
    traffic: ExpertTraffic = field(default_factory=ExpertTraffic, compare=False)

    @property
    def num_bytes(self) -> int:
        """Bytes of all experts."""
        return sum(map(len, self.packed)) * self.layout.num_bytes


# Beside the model rather than in it: nnx sees every attribute of a module, jit's keys would too.
_EXPERTS: WeakKeyDictionary[DeepSeekV2, HostExperts] = WeakKeyDictionary()


def host_experts_of(model: DeepSeekV2) -> HostExperts | None:
    """Returns the experts that a model has in the host's memory; None where it has its own.

    Raises:
        ValueError: it has neither: a copy of a model whose experts are in the host's memory.
    """
    found = _EXPERTS.get(model)
    if found is None and model.moe_layers is not None:
        moe = model.moe_layers.feed_forward
        assert isinstance(moe, MoE)
        if 0 in moe.w_gate.weight.shape:
            raise ValueError("model: its experts are in the host's memory, and this is a copy")
    return found


def set_host_experts(model: DeepSeekV2, experts: HostExperts) -> None:
    """Gives a model experts in the host's memory, in the place of those it has."""
    _EXPERTS[model] = experts


def is_routed(path: Path) -> bool:
    """Whether a parameter belongs to the routed experts."""
    return path[:2] == _PREFIX and path[2] in MATRICES


def no_experts(shape: tuple[int, ...], dtype: np.dtype) -> jax.Array:
    """Returns what a model has in the place of its routed experts [L, E, ...]."""
    return jnp.zeros((shape[0], 0, *shape[2:]), dtype)


def must_leave_device(
    parameters: nnx.State,
    dtype_of: Callable[[Path], np.dtype],
    device_memory: int,
    rules: ShardingRules,
) -> bool:
    """Says whether a model's experts must stay in the host's memory.

    Args:
        parameters: the model's, shapes alone.
        dtype_of: the type that each is kept in.
        device_memory: bytes.
        rules: how the model is divided.

    Raises:
        ValueError: not even the rest fits, or the model is divided over devices.
    """
    if rules.mesh is not None:
        raise ValueError(
            f"device_memory={device_memory}: is for one device, and the model is divided over "
            f"{rules.mesh.size}; without it, all of a device is used"
        )
    rest = routed = 0
    for key, variable in nnx.to_flat_state(parameters):
        path = tuple(map(str, key))
        num_bytes = stored_bytes(tuple(variable.shape), dtype_of(path))
        routed += num_bytes if is_routed(path) else 0
        rest += 0 if is_routed(path) else num_bytes
    room = int(_SHARE_OF_WEIGHTS * device_memory)
    if rest > room:
        raise ValueError(
            f"device_memory={device_memory}: the weights without routed experts take {rest:,} "
            f"bytes, and all weights may take {room:,}"
        )
    return rest + routed > room


def stored_bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Returns the bytes of an array on a device, where two numbers of 4 bits share one."""
    size = math.prod(shape)
    halves = jnp.dtype(dtype) in (jnp.dtype(jnp.int4), jnp.dtype(jnp.uint4))
    return -(-size // 2) if halves else size * jnp.dtype(dtype).itemsize


def read_experts(
    read: Callable[[Path, tuple[slice, ...]], np.ndarray],
    abstract: DeepSeekV2,
    dtype_of: Callable[[Path], np.dtype],
    device: jax.Device,
    device_memory: int | None,
) -> HostExperts:
    """Reads a model's routed experts into the host's memory, some at a time, and shows progress.

    Args:
        read: gives a window of a parameter.
        abstract: the model, shapes alone.
        dtype_of: the type that a parameter is kept in.
        device: that will copy them.
        device_memory: what `HostExperts` has of it.
    """
    moe = _with_types(abstract, dtype_of)
    layout = ExpertLayout.of(moe)
    num_layers, num_experts = moe.w_gate.weight.shape[:2]
    widest = sum(math.prod(leaf.shape) for leaf in layout.leaves) * 2
    together = min(num_experts, max(1, _READ_BYTES // widest))
    packed: list[list[jax.Array]] = []
    total = num_layers * num_experts * layout.num_bytes
    with JobProgress("experts into host memory", total, unit="bytes") as progress:
        for layer in range(num_layers):
            packed.append([])
            for first in range(0, num_experts, together):
                last = min(first + together, num_experts)
                stacks = {}
                for leaf in layout.leaves:
                    path = (*_PREFIX, leaf.matrix, leaf.leaf)
                    sizes = (slice(0, size) for size in leaf.shape)
                    window = (slice(layer, layer + 1), slice(first, last), *sizes)
                    stacks[leaf.matrix, leaf.leaf] = read(path, window)[0].astype(
                        jnp.dtype(leaf.dtype), copy=False
                    )
                for index in range(last - first):
                    one = {key: stack[index] for key, stack in stacks.items()}
                    packed[-1].append(pinned(layout.pack(one), device))
                progress.advance((last - first) * layout.num_bytes)
    return HostExperts(layout, packed, device_memory)


def take_experts(model: DeepSeekV2, device_memory: int | None = None) -> DeepSeekV2:
    """Returns the same model with its routed experts in the host's memory.

    Raises:
        ValueError: it has none, or is divided over devices.
    """
    if model.moe_layers is None or model.options.rules.mesh is not None:
        raise ValueError("model: only one device's model with experts keeps them in host memory")
    graphdef, state = nnx.split(model)
    flat = {tuple(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}
    (device,) = flat["embed", "weight"][...].devices()

    def read(path: Path, window: tuple[slice, ...]) -> np.ndarray:
        return np.asarray(flat[path][...][window])

    experts = read_experts(read, model, lambda path: flat[path].dtype, device, device_memory)
    leaves = [
        (
            path,
            variable.replace(no_experts(variable.shape, variable.dtype))
            if is_routed(tuple(map(str, path)))
            else variable,
        )
        for path, variable in nnx.to_flat_state(state)
    ]
    taken = nnx.merge(graphdef, nnx.from_flat_state(leaves))
    set_host_experts(taken, experts)
    return taken


def pinned(packed: np.ndarray, device: jax.Device) -> jax.Array:
    """Puts bytes where the device can copy them from without the host's help."""
    sharding = SingleDeviceSharding(device, memory_kind=_PINNED)
    return jax.device_put(packed, sharding)


def _with_types(model: DeepSeekV2, dtype_of: Callable[[Path], np.dtype]) -> MoE:
    """Returns the stack of expert layers, shapes alone, with the types that will be kept."""
    graphdef, state = nnx.split(model)
    leaves = []
    for path, variable in nnx.to_flat_state(state):
        name = tuple(map(str, path))
        dtype = dtype_of(name) if is_routed(name) else variable.dtype
        leaves.append((path, variable.replace(jax.ShapeDtypeStruct(variable.shape, dtype))))
    layers = nnx.merge(graphdef, nnx.from_flat_state(leaves)).moe_layers
    assert layers is not None
    assert isinstance(layers.feed_forward, MoE)
    return layers.feed_forward
