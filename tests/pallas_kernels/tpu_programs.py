"""Compiles kernels for TPUs that are not there; run as a module, in a process of its own.

    python -m tests.pallas_kernels.tpu_programs attention v5e,v5p,v6e,tpu7x

prints one JSON line per chip and program.
"""

import functools
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from tests import tpu_compiler, tpu_facts
from tests.tpu_compiler import TOPOLOGIES

if TYPE_CHECKING:
    from jax.typing import DTypeLike

type Programs = dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]


def compile_programs(which: str, chips: str) -> list[dict]:
    """Compiles the attention, decode or sharded programs for these chips."""
    return tpu_compiler.run_compiler("tests.pallas_kernels.tpu_programs", which, chips)


def attention_programs() -> Programs:
    """Training at V2's shape; V2-Lite's packed; a chunk of a prefill with an offset."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.mla_attention import mla_attention

    def arguments(
        batch: int,
        queries: int,
        keys: int,
        heads: int,
        segments: bool = False,
        offset: bool = False,
    ) -> tuple[Any, ...]:
        def array(*shape: int, dtype: "DTypeLike" = jnp.bfloat16) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((batch, *shape), dtype)

        arrays = (
            array(queries, heads, 128),
            array(queries, heads, 64),
            array(keys, heads, 128),
            array(keys, 64),
            array(keys, heads, 128),
        )
        masks = {}
        if segments:
            masks["q_segment_ids_BT"] = array(queries, dtype=jnp.int32)
            masks["kv_segment_ids_BS"] = array(keys, dtype=jnp.int32)
        if offset:
            masks["q_offset_B"] = array(dtype=jnp.int32)
        return arrays, masks

    attend = functools.partial(mla_attention, scale=0.1, implementation="tpu")

    def step(arrays: Any, masks: Any) -> Any:
        def loss(*arrays: jax.Array) -> jax.Array:
            return attend(*arrays, **masks).astype(jnp.float32).sum()

        return jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4))(*arrays)

    return {
        "v2_training": (step, arguments(1, 4096, 4096, 128)),
        "v2_lite_packed": (step, arguments(2, 2048, 2048, 16, segments=True)),
        "v2_lite_prefill": (
            lambda arrays, masks: attend(*arrays, **masks),
            arguments(1, 512, 4096, 16, offset=True),
        ),
    }


def decode_programs() -> Programs:
    """V2's and V2-Lite's heads, one and more query tokens, all kinds of latents."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.mla_decode import LatentPages, mla_decode

    def arguments(
        batch: int,
        tokens: int,
        heads: int,
        columns: int,
        dtype: "DTypeLike",
        rope_lanes: int = 64,
    ) -> tuple[Any, ...]:
        def array(*shape: int, dtype: "DTypeLike" = jnp.bfloat16) -> Any:
            return jax.ShapeDtypeStruct(shape, dtype)

        num_pages = batch * columns
        quantized = jnp.dtype(dtype).itemsize == 1
        pages = LatentPages(
            array(num_pages, 64, 512, dtype=dtype),
            array(num_pages, 64, rope_lanes),
            array(num_pages, 64, dtype=jnp.float32) if quantized else None,
        )
        queries = array(batch, tokens, heads, 512), array(batch, tokens, heads, 64)
        return (
            *queries,
            pages,
            array(batch, columns, dtype=jnp.int32),
            array(batch, dtype=jnp.int32),
        )

    decode = functools.partial(mla_decode, scale=0.1, implementation="tpu")
    return {
        "v2": (decode, arguments(32, 1, 128, 64, jnp.bfloat16)),
        "v2_two_tokens_int8": (decode, arguments(32, 2, 128, 64, jnp.int8)),
        "v2_lite": (decode, arguments(2, 1, 16, 2048, jnp.bfloat16)),
        "v2_lite_whole_lanes": (decode, arguments(2, 1, 16, 2048, jnp.bfloat16, rope_lanes=128)),
        "v2_lite_four_tokens_float8": (decode, arguments(64, 4, 16, 64, jnp.float8_e4m3fn)),
    }


def sharded_programs() -> Programs:
    """A training step and a decoding step within `jax.shard_map` over sequences and heads."""
    import jax
    from jax.sharding import PartitionSpec as P

    step, (arrays, masks) = attention_programs()["v2_lite_packed"]
    heads, shared = P("data", None, "tensor"), P("data")
    specs = (heads, heads, heads, shared, heads)

    def sharded_step(mesh: jax.sharding.Mesh) -> Callable[..., Any]:
        def local(arrays: Any, masks: Any) -> Any:
            loss, grads = step(arrays, masks)
            return jax.lax.psum(loss, ("data", "tensor")), grads

        in_specs = (specs, dict.fromkeys(masks, shared))
        return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=(P(), specs))

    decode, decode_arguments = decode_programs()["v2_lite"]

    def sharded_decode(mesh: jax.sharding.Mesh) -> Callable[..., Any]:
        in_specs = (heads, heads, P(), shared, shared)
        return jax.shard_map(decode, mesh=mesh, in_specs=in_specs, out_specs=(heads, heads))

    return {
        "training": (sharded_step, (arrays, masks)),
        "decode": (sharded_decode, decode_arguments),
    }


def main(which: str, chips: str) -> None:
    """Compiles and prints."""
    import jax
    import numpy as np
    from jax.sharding import (
        AxisType,
        Mesh,
        NamedSharding,
        PartitionSpec,
        Sharding,
        SingleDeviceSharding,
    )

    from dsjax.plan import tpu_devices

    for chip in chips.split(","):
        devices = tpu_devices(TOPOLOGIES[chip])
        for name, (fn, args) in globals()[f"{which}_programs"]().items():
            sharding: Sharding = SingleDeviceSharding(devices[0])
            if which == "sharded":
                grid = np.array(devices[:4]).reshape(2, 2)
                mesh = Mesh(grid, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
                fn, sharding = fn(mesh), NamedSharding(mesh, PartitionSpec())
            args = jax.tree.map(
                lambda x, s=sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), args
            )
            # Kernels ask the mesh in use for the chip; `shard_map` brings its own.
            alone = Mesh(devices[:1], ("chip",)).abstract_mesh
            with jax.sharding.use_abstract_mesh(alone) if which != "sharded" else nullcontext():
                lowered = jax.jit(fn).trace(*args).lower()
            found = tpu_compiler.facts(
                which, f"{chip} {name}", lowered, TOPOLOGIES[chip], tpu_facts.kernels_and_memory
            )
            print(json.dumps({"chip": chip, "program": name} | found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
