"""Compiles kernels for TPUs that are not there; run as a module, in a process of its own.

    python -m tests.pallas_kernels.tpu_programs attention v5e,v5p,v6e,tpu7x

prints one JSON line per chip and program: its name, the kernels in it, its temporary bytes and the
shapes that it copies.
"""

import functools
import json
import os
import re
import subprocess
import sys
from contextlib import nullcontext

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}


def run_compiler(module: str, *arguments: str) -> list[dict]:
    """Runs a module in a subprocess, as libtpu wants a process without XLA's CPU flags.

    Returns what the JSON lines that it printed hold.
    """
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | ENVIRONMENT
    command = [sys.executable, "-m", module, *arguments]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=1500
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


def compile_programs(which: str, chips: str) -> list[dict]:
    """Compiles the attention, decode or sharded programs for these chips."""
    return run_compiler("tests.pallas_kernels.tpu_programs", which, chips)


def attention_programs():
    """Training at V2's shape; V2-Lite's packed; a chunk of a prefill with an offset."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.mla_attention import mla_attention

    def arguments(batch, queries, keys, heads, segments=False, offset=False):
        def array(*shape, dtype=jnp.bfloat16):
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

    def step(arrays, masks):
        def loss(*arrays):
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


def decode_programs():
    """V2's and V2-Lite's heads, one and more query tokens, all kinds of latents."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.mla_decode import LatentPages, mla_decode

    def arguments(batch, tokens, heads, columns, dtype, rope_lanes=64):
        def array(*shape, dtype=jnp.bfloat16):
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


def sharded_programs():
    """A training step and a decoding step within `jax.shard_map` over sequences and heads."""
    import jax
    from jax.sharding import PartitionSpec as P

    step, (arrays, masks) = attention_programs()["v2_lite_packed"]
    heads, shared = P("data", None, "tensor"), P("data")
    specs = (heads, heads, heads, shared, heads)

    def sharded_step(mesh):
        def local(arrays, masks):
            loss, grads = step(arrays, masks)
            return jax.lax.psum(loss, ("data", "tensor")), grads

        in_specs = (specs, dict.fromkeys(masks, shared))
        return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=(P(), specs))

    decode, decode_arguments = decode_programs()["v2_lite"]

    def sharded_decode(mesh):
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
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

    for chip in chips.split(","):
        devices = topologies.get_topology_desc(
            platform="tpu", topology_name=TOPOLOGIES[chip]
        ).devices
        for name, (fn, args) in globals()[f"{which}_programs"]().items():
            sharding = SingleDeviceSharding(devices[0])
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
                compiled = jax.jit(fn).trace(*args).lower().compile()
            calls = re.findall(
                r"%?([a-z_]+)[\w.\-]* = [^\n]*custom_call_target=\"tpu_custom_call\"",
                compiled.as_text(),
            )
            temporary = compiled.memory_analysis().temp_size_in_bytes
            result = {"chip": chip, "program": name, "kernels": calls, "temporary": temporary}
            result["copied"] = re.findall(r"= \w+\[([\d,]+)\]\S* copy\(", compiled.as_text())
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
