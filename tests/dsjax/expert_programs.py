"""Compiles a layer of experts for TPU pods that are not there; run as a module, in its own process.

    python -m tests.dsjax.expert_programs deepseek_v2 v5p:4x4x4 fsdp=8,expert=8 4096 1.5 1

prints one JSON line a layer, forward and backward, the shared experts included: the kernels in it,
the room of its exchanges in bytes a device, the products that run beside each, and its temporary
memory. The last words are `exchange_room`, with as much as there are shards one pass takes all and
its kernels are compiled once rather than twice, and `exchange_chunks`.
"""

import dataclasses
import importlib
import json
import math
import sys
from typing import TYPE_CHECKING, Any

from tests import tpu_compiler, tpu_facts
from tests.tpu_compiler import abstract_layer, run_compiler

if TYPE_CHECKING:
    import jax


def compile_layers(*programs: tuple[str, str, str, int, float, int]) -> list[dict]:
    """Compiles the layers, each given as on the command line."""
    arguments = [str(word) for program in programs for word in program]
    return run_compiler("tests.dsjax.expert_programs", *arguments)


def lower_layer(
    model: str, topology: str, axes: str, tokens: int, room: float, chunks: int
) -> "jax.stages.Lowered":
    """Returns the lowered forward and backward of one layer with `tokens` a device."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from dsjax.config import MeshConfig, RuntimeConfig
    from dsjax.kernels import choose_kernels
    from dsjax.layers.moe import MoE
    from dsjax.layers.options import LayerOptions
    from dsjax.mesh import make_mesh, train_rules
    from dsjax.plan import tpu_devices

    config = importlib.import_module(f"dsjax.configs.models.{model}").config
    sizes = {"fsdp": 1} | {k: int(v) for k, v in (pair.split("=") for pair in axes.split(","))}
    devices = tpu_devices(topology)
    rules = train_rules(make_mesh(MeshConfig(**sizes), devices[: math.prod(sizes.values())]))
    kernels = choose_kernels(devices[0], config, RuntimeConfig())
    kernels = dataclasses.replace(kernels, exchange_room=room, exchange_chunks=chunks)
    options = LayerOptions.of(config, RuntimeConfig(), rules, kernels)
    graph, state = abstract_layer(
        lambda: MoE(config.moe, config.hidden_dim, options, nnx.Rngs(0)), rules
    )
    x = jax.ShapeDtypeStruct(
        (rules.num_batch_shards(), tokens, config.hidden_dim),
        jnp.bfloat16,
        sharding=rules.sharding("batch", "length", "embed"),
    )

    def step(state: nnx.State, x_BTD: jax.Array) -> Any:
        def loss(state: nnx.State, x_BTD: jax.Array) -> jax.Array:
            out_BTD, stats = nnx.merge(graph, state)(x_BTD, None, None)
            return jnp.sum(out_BTD.astype(jnp.float32) ** 2) + stats.expert

        return jax.grad(loss, argnums=(0, 1))(state, x_BTD)

    return jax.jit(step).trace(state, x).lower()


def main(*arguments: str) -> None:
    """Compiles and prints."""
    from dsjax.xla_options import compiler_options

    for first in range(0, len(arguments), 6):
        model, topology, axes, tokens, room, chunks = arguments[first : first + 6]
        lowered = lower_layer(model, topology, axes, int(tokens), float(room), int(chunks))
        program = {"model": model, "topology": topology, "axes": axes, "tokens": int(tokens)}
        found = tpu_compiler.facts(
            "expert_layers",
            " ".join(arguments[first : first + 6]),
            lowered,
            topology,
            tpu_facts.exchanges,
            compiler_options("tpu"),
        )
        print(json.dumps(program | found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
