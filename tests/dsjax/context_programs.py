"""Compiles attention over divided rows for TPUs that are not there; run in its own process.

    python -m tests.dsjax.context_programs v5p:2x2x1 4 1024 gather

prints one JSON line a program, forward and backward of V2-Lite's attention layer with so many
tokens on each of so many devices: what it sends over each axis of the mesh, and its kernels.
"""

import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Any

from tests import tpu_compiler, tpu_facts
from tests.tpu_compiler import abstract_layer, run_compiler

if TYPE_CHECKING:
    import jax


def compile_attention(*programs: tuple[str, int, int, str]) -> list[dict]:
    """Compiles the layers, each given as on the command line."""
    arguments = [str(word) for program in programs for word in program]
    return run_compiler("tests.dsjax.context_programs", *arguments)


def lower_attention(
    topology: str, shards: int, tokens: int, transport: str
) -> "jax.stages.Lowered":
    """Returns the lowered forward and backward of one layer."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from dsjax.config import MeshConfig, RuntimeConfig
    from dsjax.configs.models.deepseek_v2_lite import config
    from dsjax.kernels import choose_kernels
    from dsjax.layers.attention import MLA
    from dsjax.layers.options import LayerOptions
    from dsjax.mesh import make_mesh, train_rules
    from dsjax.plan import tpu_devices

    devices = tpu_devices(topology)[:shards]
    rules = train_rules(make_mesh(MeshConfig(fsdp=1, context=shards), devices))
    kernels = choose_kernels(devices[0], config, RuntimeConfig())
    kernels = dataclasses.replace(kernels, latent_exchange=transport)
    options = LayerOptions.of(config, RuntimeConfig(), rules, kernels)
    graph, state = abstract_layer(
        lambda: MLA(config.attention, config.hidden_dim, options, nnx.Rngs(0)), rules
    )

    def row(dtype: Any, *sizes: int) -> jax.ShapeDtypeStruct:
        dims = ("batch", "length", "embed")[: 2 + len(sizes)]
        shape = (1, tokens * shards, *sizes)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=rules.sharding(*dims))

    def step(state: nnx.State, x_BTD: jax.Array, ids_BT: jax.Array) -> Any:
        def loss(state: nnx.State, x_BTD: jax.Array) -> jax.Array:
            out_BTD = nnx.merge(graph, state)(x_BTD, ids_BT, ids_BT)
            return jnp.sum(out_BTD.astype(jnp.float32) ** 2)

        return jax.grad(loss, argnums=(0, 1))(state, x_BTD)

    arrays = row(jnp.bfloat16, config.hidden_dim), row(jnp.int32)
    return jax.jit(step).trace(state, *arrays).lower()


def main(*arguments: str) -> None:
    """Compiles and prints."""
    from dsjax.xla_options import compiler_options

    for first in range(0, len(arguments), 4):
        topology, shards, tokens, transport = arguments[first : first + 4]
        lowered = lower_attention(topology, int(shards), int(tokens), transport)
        found = tpu_compiler.facts(
            "context_attention",
            " ".join(arguments[first : first + 4]),
            lowered,
            topology,
            tpu_facts.collectives_and_memory,
            compiler_options("tpu"),
        )
        print(json.dumps({"transport": transport} | found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
