"""Compiles a step of generation for a TPU that is not there; run as a module, in its own process.

    python -m tests.dsjax.decode_program v5p:2x2x1

prints one JSON line: temporary memory, and the bytes of one layer's experts, of which a step with
V2-Lite's shapes in three layers would copy those of every layer if its kernel could not read them
where they lie.
"""

import dataclasses
import json
import sys
from typing import Any

from tests import tpu_compiler, tpu_facts


def main(topology: str) -> None:
    """Compiles and prints."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from dsjax.cache import Part, View, allocate_pool
    from dsjax.config import MeshConfig, RuntimeConfig
    from dsjax.configs.models import deepseek_v2_lite
    from dsjax.kernels import choose_kernels
    from dsjax.mesh import inference_rules, make_mesh
    from dsjax.model import abstract_model
    from dsjax.plan import tpu_devices

    config = dataclasses.replace(deepseek_v2_lite.config, num_layers=3, vocab_size=1024)
    runtime = RuntimeConfig(param_dtype="bfloat16")
    device = tpu_devices(topology)[0]
    kernels = choose_kernels(device, config, runtime)
    rules = inference_rules(make_mesh(MeshConfig(), [device]))
    graphdef, params = abstract_model(config, runtime, rules, kernels)
    pool = jax.eval_shape(lambda: allocate_pool(config, 256, jnp.bfloat16, decode_kernel="tpu"))
    part = jax.eval_shape(
        lambda: Part(
            page_table_BP=jnp.zeros((16, 16), jnp.int32),
            lengths_B=jnp.zeros(16, jnp.int32),
            num_new_B=jnp.ones(16, jnp.int32),
            num_tokens=1,
        )
    )
    place = rules.sharding()

    def on_device(tree: Any) -> Any:
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree
        )

    def step(params: Any, tokens_T: Any, pool: Any, part: Part) -> Any:
        model = nnx.merge(graphdef, params)
        return model.extend(tokens_T, pool, View((part,)), jnp.arange(16))

    tokens = jax.ShapeDtypeStruct((16,), jnp.int32)
    arguments = on_device((params, tokens, pool, part))
    lowered = jax.jit(step, donate_argnums=2).lower(*arguments)
    assert config.moe is not None
    experts = 3 * config.moe.num_experts * config.hidden_dim * config.moe.intermediate_dim * 2
    describe = tpu_facts.kernels_and_memory
    found = tpu_compiler.facts("decode_step", topology, lowered, topology, describe)
    print(json.dumps(found | {"experts": experts}))


if __name__ == "__main__":
    main(*sys.argv[1:])
