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
import re
import sys

from tests.pallas_kernels.tpu_programs import run_compiler


def compile_layers(*programs: tuple[str, str, str, int, float, int]) -> list[dict]:
    """Compiles the layers, each given as on the command line."""
    arguments = [str(word) for program in programs for word in program]
    return run_compiler("tests.dsjax.expert_programs", *arguments)


def compile_layer(model: str, topology: str, axes: str, tokens: int, room: float, chunks: int):
    """Returns the compiled forward and backward of one layer with `tokens` a device."""
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from jax.experimental import topologies

    from dsjax.config import MeshConfig, RuntimeConfig
    from dsjax.kernels import choose_kernels
    from dsjax.layers.basic import LayerOptions
    from dsjax.layers.moe import MoE
    from dsjax.mesh import make_mesh, train_rules
    from dsjax.training.step import COMPILER_OPTIONS

    config = importlib.import_module(f"dsjax.configs.models.{model}").config
    sizes = {"fsdp": 1} | {k: int(v) for k, v in (pair.split("=") for pair in axes.split(","))}
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    rules = train_rules(make_mesh(MeshConfig(**sizes), devices[: math.prod(sizes.values())]))
    kernels = choose_kernels(devices[0], config, RuntimeConfig())
    kernels = dataclasses.replace(kernels, exchange_room=room, exchange_chunks=chunks)
    options = LayerOptions.of(config, RuntimeConfig(), rules, kernels)
    layer = nnx.eval_shape(lambda: MoE(config.moe, config.hidden_dim, options, nnx.Rngs(0)))
    graph, state = nnx.split(layer)
    state = jax.tree.map(
        lambda variable: variable.replace(
            jax.ShapeDtypeStruct(
                variable.shape,
                jnp.bfloat16,
                sharding=rules.sharding(*variable.get_metadata("dims")),
            )
        ),
        state,
        is_leaf=lambda node: isinstance(node, nnx.Variable),
    )
    x = jax.ShapeDtypeStruct(
        (rules.num_batch_shards(), tokens, config.hidden_dim),
        jnp.bfloat16,
        sharding=rules.sharding("batch", "length", "embed"),
    )

    def step(state, x_BTD):
        def loss(state, x_BTD):
            out_BTD, stats = nnx.merge(graph, state)(x_BTD, None, None)
            return jnp.sum(out_BTD.astype(jnp.float32) ** 2) + stats.expert

        return jax.grad(loss, argnums=(0, 1))(state, x_BTD)

    return jax.jit(step).trace(state, x).lower().compile(COMPILER_OPTIONS["tpu"])


_EXCHANGE = re.compile(r"%(\S+) = (.*?) ragged-all-to-all(-start)?\(")
_ARRAY = re.compile(r"\b(bf16|s32|f32)\[([\d,]+)\]")
_PRODUCT = re.compile(
    r"%(\S+) = .* (?:fusion|convolution|custom-call)\(.*"
    r"op_name=\"[^\"]*(?:dot_general|/grouped_\w+/pallas_call)"
)


def describe(compiled) -> dict:
    """What a compiled layer consists of, as far as it concerns the exchange."""
    lines = compiled.as_text().splitlines()
    exchanges, beside = [], []
    for number, line in enumerate(lines):
        found = _EXCHANGE.search(line)
        if found is None:
            continue
        # A start's result names first what is sent, then what is filled.
        dtype, shape = _ARRAY.findall(found[2])[1 if found[3] else 0]
        size = {"bf16": 2, "s32": 4, "f32": 4}[dtype]
        exchanges.append([dtype, size * math.prod(int(size) for size in shape.split(","))])
        beside.append([])
        for later in lines[number + 1 :] if found[3] else ():
            if f"ragged-all-to-all-done(%{found[1]})" in later:
                break
            beside[-1] += [product[1] for product in [_PRODUCT.search(later)] if product]
    return {
        "kernels": sorted(
            set(
                re.findall(
                    r"(grouped_[a-z]+(?:_[a-z]+)*)[\w.\-]* = [^\n]*tpu_custom_call",
                    "\n".join(lines),
                )
            )
        ),
        "exchanges": exchanges,
        "beside": beside,
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
    }


def main(*arguments: str) -> None:
    """Compiles and prints."""
    for first in range(0, len(arguments), 6):
        model, topology, axes, tokens, room, chunks = arguments[first : first + 6]
        compiled = compile_layer(model, topology, axes, int(tokens), float(room), int(chunks))
        program = {"model": model, "topology": topology, "axes": axes, "tokens": int(tokens)}
        print(json.dumps(program | describe(compiled)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
