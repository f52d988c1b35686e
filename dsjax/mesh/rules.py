"""Where arrays live: logical dims, and the explicit tables from them to mesh axes."""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsjax.mesh.axes import BATCH_AXES, MESH_AXES

Dims = tuple[str | None, ...]

_TRAIN_TABLE: dict[str, tuple[str, ...]] = {
    # activations
    "batch": BATCH_AXES,
    "length": ("context",),
    "embed": (),
    "pages": (),  # of the latent pool
    "page_tokens": ("tensor",),  # as heads are: no device of theirs keeps a copy of the pool
    # parameters
    "layers": (),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "head_dim": (),
    "q_latent": (),  # as a projection's output
    "kv_latent": (),
    "q_latent_in": ("fsdp", "expert"),  # as a projection's input
    "kv_latent_in": ("fsdp", "expert"),
    "mlp": ("tensor",),
    "experts": ("expert",),
    "param_embed": ("fsdp", "expert"),
    "expert_embed": ("fsdp",),
    "router_experts": (),
    "norm": (),
}


@dataclass(frozen=True)
class ShardingRules:
    """A mesh, and the table from logical dims to its axes; hashable, so part of a jit key.

    Attributes:
        mesh: the device mesh, or None for one device and no constraints.
        table: pairs of a logical dim and the mesh axes that divide it.
    """

    mesh: Mesh | None = None
    table: tuple[tuple[str, tuple[str, ...]], ...] = tuple(_TRAIN_TABLE.items())

    def __post_init__(self) -> None:
        axes = MESH_AXES if self.mesh is None else self.mesh.axis_names
        for dim, entry in self.table:
            for axis in entry:
                if axis not in axes:
                    near = difflib.get_close_matches(axis, axes, n=1)
                    hint = f"; did you mean {near[0]!r}?" if near else ""
                    raise ValueError(f"sharding rule {dim!r}: no mesh axis {axis!r}{hint}")

    def spec(self, *dims: str | None) -> PartitionSpec:
        """Returns the PartitionSpec of an array with these logical dims; None is not divided.

        Raises:
            ValueError: an unknown logical dim, or one mesh axis used by two dims.
        """
        table = dict(self.table)
        entries: list[tuple[str, ...] | None] = []
        used: dict[str, str] = {}
        for dim in dims:
            if dim is None:
                entries.append(None)
                continue
            if dim not in table:
                near = difflib.get_close_matches(dim, table, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"logical dim {dim!r}: not in the sharding table{hint}")
            for axis in table[dim]:
                if axis in used:
                    raise ValueError(
                        f"mesh axis {axis!r} divides both {used[axis]!r} and {dim!r} of {dims}"
                    )
                used[axis] = dim
            entries.append(table[dim] or None)
        return PartitionSpec(*entries)

    def sharding(self, *dims: str | None) -> NamedSharding | None:
        """Returns the NamedSharding of an array with these logical dims, or None off a mesh."""
        return None if self.mesh is None else NamedSharding(self.mesh, self.spec(*dims))

    def constrain(self, array: jax.Array, *dims: str | None) -> jax.Array:
        """Asks the compiler to lay an intermediate array out by these logical dims."""
        if self.mesh is None:
            return array
        return jax.lax.with_sharding_constraint(array, self.sharding(*dims))

    def gather_minor_axes(self, weight: jax.Array, *dims: str | None) -> jax.Array:
        """Begins to gather a weight where more than one mesh axis divides a dim (fsdp).

        A dim comes back divided by its first axis alone, so that two gathers follow one another,
        each along an axis of the mesh. All chips at once, which is what a plain use of the weight
        asks for, libtpu gathers by an all-reduce of an array that is zero elsewhere, at twice the
        bytes. The gradient goes straight back to where the weight lives.
        """
        split = [() if dim is None else self.dividing_axes(dim) for dim in dims]
        if all(len(axes) < 2 for axes in split):
            return weight
        first = PartitionSpec(*(axes[:1] or None for axes in split))
        assert self.mesh is not None
        return _constrain_forward(NamedSharding(self.mesh, first), weight)

    def dividing_axes(self, dim: str) -> tuple[str, ...]:
        """Returns the mesh axes of more than one device that divide a logical dim."""
        return tuple(axis for axis in self.axes(dim) if self.axis_size(axis) > 1)

    def axes(self, dim: str) -> tuple[str, ...]:
        """Returns the mesh axes that the table gives a logical dim."""
        return dict(self.table)[dim]

    def shard_map(
        self,
        f: Callable[..., Any],
        in_dims: tuple[Any, ...],
        out_dims: Any,
        axes: tuple[str, ...] | None = None,
    ) -> Callable[..., Any]:
        """Returns f run once per device on its shards; f itself off a mesh.

        Args:
            f: a function of arrays, or of pytrees of them.
            in_dims: of each argument, a pytree of logical dims; () for an array, or a whole
                pytree, that is not divided, and None for an argument that is None.
            out_dims: the same of the result.
            axes: mesh axes that divide f's arrays; None for all. Along the others the compiler
                divides the work as it does outside.
        """
        if self.mesh is None:
            return f
        manual = self.mesh.axis_names if axes is None else axes

        def spec(dims: Dims | None) -> PartitionSpec:
            if axes is None:
                return self.spec(*(dims or ()))
            entries = (() if dim is None else self.axes(dim) for dim in dims or ())
            return PartitionSpec(
                *(tuple(axis for axis in entry if axis in manual) or None for entry in entries)
            )

        # Pallas calls do not say how their results vary over the mesh, so this is not checked.
        return jax.shard_map(
            f,
            mesh=self.mesh,
            in_specs=jax.tree.map(spec, in_dims, is_leaf=_is_dims),
            out_specs=jax.tree.map(spec, out_dims, is_leaf=_is_dims),
            axis_names=set(manual),
            check_vma=False,
        )

    def axis_size(self, axis: str) -> int:
        """Returns the number of devices along a mesh axis, 1 off a mesh."""
        return 1 if self.mesh is None else self.mesh.shape[axis]

    def num_shards(self, dim: str) -> int:
        """Returns the number of parts that the rules divide a logical dim into."""
        return math.prod(self.axis_size(axis) for axis in self.axes(dim))

    def num_batch_shards(self) -> int:
        """Returns the number of parts that the rules divide a batch into."""
        return self.num_shards("batch")


def _is_dims(node: Any) -> bool:
    """Whether a node of a pytree is the logical dims of one array."""
    return isinstance(node, tuple) and all(dim is None or isinstance(dim, str) for dim in node)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _constrain_forward(sharding: NamedSharding, array: jax.Array) -> jax.Array:
    return jax.lax.with_sharding_constraint(array, sharding)


_constrain_forward.defvjp(
    lambda sharding, array: (_constrain_forward(sharding, array), None),
    lambda sharding, _, d_array: (d_array,),
)


# Dims of parameters that are gathered just in time.
_GATHERED = ("param_embed", "expert_embed", "q_latent_in", "kv_latent_in")


def train_rules(mesh: Mesh | None) -> ShardingRules:
    """Returns the table for training: fsdp over parameters, the batch over every data axis.

    Devices that divide rows (context) divide parameters as fsdp does: a row over n of them leaves
    each an n-th of parameters, gradients and moments, as n rows of a batch would.
    """
    table = dict(_TRAIN_TABLE)
    if mesh is not None and dict(mesh.shape).get("context", 1) > 1:
        table |= {dim: (*table[dim], "context") for dim in _GATHERED}
    return ShardingRules(mesh, tuple(table.items()))


def inference_rules(mesh: Mesh | None) -> ShardingRules:
    """Returns the table for generation: no parameter is gathered, sequences are not divided.

    Raises:
        ValueError: a mesh for training on divided rows, of which generation would make copies.
    """
    context = 1 if mesh is None else dict(mesh.shape).get("context", 1)
    if context > 1:
        raise ValueError(f"mesh.context={context}: must be 1 for generation, which divides no row")
    table = _TRAIN_TABLE | dict.fromkeys((*_GATHERED, "batch", "length"), ())
    return ShardingRules(mesh, tuple(table.items()))


def serving_rules(mesh: Mesh | None) -> ShardingRules:
    """Returns the table for many sequences at once: they and their pages are divided.

    Parameters lie as `inference_rules` has them. The axes that divide a batch in training have
    sequences of their own, whose tokens travel to the experts; heads are divided as ever.
    """
    table = dict(inference_rules(mesh).table)
    return ShardingRules(
        mesh, tuple((table | dict.fromkeys(("batch", "pages"), BATCH_AXES)).items())
    )


def check_divisible(
    rules: ShardingRules, shapes: Mapping[str, tuple[tuple[int, ...], tuple[str | None, ...]]]
) -> None:
    """Checks that every array divides evenly over the mesh, before anything is allocated.

    Args:
        rules: the table in force.
        shapes: of each array, by name: its shape and its logical dims.

    Raises:
        ValueError: names every array, dim and mesh axes that do not fit, in one message.
    """
    if rules.mesh is None:
        return
    table = dict(rules.table)
    faults = []
    for name, (shape, dims) in shapes.items():
        for size, dim in zip(shape, dims, strict=True):
            axes = table[dim] if dim is not None else ()
            parts = math.prod(rules.axis_size(axis) for axis in axes)
            if size % parts:
                faults.append(f"{name}: {dim}={size} is not divisible by mesh {axes}={parts}")
    if faults:
        raise ValueError("; ".join(faults))
