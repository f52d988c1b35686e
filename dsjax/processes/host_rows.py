"""Which rows of every batch a process feeds."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.mesh import ShardingRules, to_stripes


class HostShard:
    """Which rows of every batch this process feeds.

    Attributes:
        index: this process's place among those that feed different rows.
        count: how many those are. Devices along an axis that does not divide the batch hold the
            same rows, so these may be fewer than there are processes.
    """

    def __init__(self, rules: ShardingRules):
        self.index, self.count = 0, 1
        self._sharding = rules.sharding(None, "batch", "length")
        self._stripes = rules.num_shards("length")
        self._rows_sharding = rules.sharding(None, "batch")
        if self._rows_sharding is None:
            return
        # A mesh that follows a pod's wires may give a process rows that do not lie together.
        rows_of: dict[int, set[int]] = {}
        shape = (1, rules.num_batch_shards())
        devices: Any = self._rows_sharding.devices_indices_map(shape)
        for device, (_, rows) in devices.items():
            rows_of.setdefault(device.process_index, set()).add(rows.start or 0)
        shares = sorted({tuple(sorted(rows)) for rows in rows_of.values()})
        if sum(map(len, shares)) != rules.num_batch_shards():
            raise ValueError(
                f"mesh={dict(rules.mesh.shape) if rules.mesh else None}: processes share some rows "
                "of the batch but not all; give data, fsdp and expert whole processes"
            )
        self.index = shares.index(tuple(sorted(rows_of[jax.process_index()])))
        self.count = len(shares)

    def place(self, batch: dict[str, np.ndarray], num_slices: int) -> dict[str, jax.Array]:
        """Makes this process's rows a part of the global batch [slices, sequences, ...].

        Where devices divide the rows too, their tokens are put into striped order
        (`dsjax.mesh.stripes`).
        """

        def put(rows: np.ndarray) -> jax.Array:
            sliced = rows.reshape(num_slices, -1, *rows.shape[1:])
            sharding = self._sharding if rows.ndim > 1 else self._rows_sharding
            if sharding is None:
                return jnp.asarray(sliced)
            if rows.ndim > 1 and self._stripes > 1:
                sliced = self._own_tokens(to_stripes(sliced, self._stripes, axis=2))
            return jax.make_array_from_process_local_data(sharding, sliced)

        return {name: put(rows) for name, rows in batch.items()}

    def _own_tokens(self, sliced: np.ndarray) -> np.ndarray:
        """Cuts out of striped rows the stripes of this process's devices."""
        assert self._sharding is not None
        shape = (1, self._sharding.num_devices, self._stripes)
        places: Any = self._sharding.addressable_devices_indices_map(shape)
        own = sorted({index[2].start or 0 for index in places.values()})
        stripes = np.split(sliced, self._stripes, axis=2)
        return np.concatenate([stripes[place] for place in own], axis=2)
