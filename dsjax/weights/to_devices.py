"""Windows of a parameter from disk onto the devices that hold them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.families.tensors import Path
from dsjax.weights.sources import WeightSource

# Arrays up to this size cross between host and device whole, larger ones in parts.
HOST_BYTES = 256 << 20


def load_array(
    source: WeightSource,
    path: Path,
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: jax.sharding.Sharding | None,
) -> jax.Array:
    fill = functools.partial(_fill, functools.partial(source.read, path), dtype=dtype)
    if sharding is None:
        return fill(tuple(slice(0, size) for size in shape), device=None)
    # Devices that hold copies of the same shard share one reading of it.
    devices_of: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None
        bounds = tuple(i.indices(size)[:2] for i, size in zip(index, shape, strict=True))
        devices_of.setdefault(bounds, []).append(device)
    shards = []
    for bounds, devices in devices_of.items():
        shard = fill(tuple(slice(*pair) for pair in bounds), device=devices[0])
        shards += [shard] + [jax.device_put(shard, device) for device in devices[1:]]
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _fill(
    read: Callable[[tuple[slice, ...]], np.ndarray],
    window: tuple[slice, ...],
    *,
    dtype: np.dtype,
    device: jax.Device | None,
) -> jax.Array:
    """Reads a window onto a device; one that is large, layer by layer."""
    shape = tuple(w.stop - w.start for w in window)
    if math.prod(shape) * dtype.itemsize <= HOST_BYTES or shape[0] == 1:
        return jax.device_put(read(window).astype(dtype, copy=False), device)
    out = jnp.zeros(shape, dtype, device=device)
    rows = max(1, HOST_BYTES * shape[0] // (math.prod(shape) * dtype.itemsize))
    for start in range(0, shape[0], rows):
        stop = min(start + rows, shape[0])
        block = slice(window[0].start + start, window[0].start + stop)
        piece = read((block, *window[1:])).astype(dtype, copy=False)
        out = _set_rows(out, jax.device_put(piece, device), start)
        out.block_until_ready()  # so that only one block at a time is on the host
    return out


@functools.partial(jax.jit, donate_argnums=0)
def _set_rows(out: jax.Array, piece: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(out, piece, start, axis=0)
