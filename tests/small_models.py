"""Models small enough to test, with weights large enough that a mistake shows in the logits."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsjax.config import (
    AttentionConfig,
    BalanceConfig,
    LossConfig,
    ModelConfig,
    MoEConfig,
    RuntimeConfig,
    YarnConfig,
)
from dsjax.kernels import Kernels
from dsjax.layers.moe import MoE
from dsjax.mesh import ShardingRules
from dsjax.model import DeepSeekV2, abstract_model, param_shardings

SMALL_MOE = MoEConfig(
    num_experts=8,
    top_k=3,
    intermediate_dim=20,
    num_shared_experts=2,
    num_groups=4,
    top_groups=2,
    routing="group_limited_greedy",
    routed_scale=2.5,
)

# Every feature of V2. The widths differ from one another, so that no mix-up fits by chance.
SMALL = ModelConfig(
    vocab_size=48,
    hidden_dim=32,
    num_layers=3,
    num_dense_layers=1,
    intermediate_dim=56,
    max_length=256,
    attention=AttentionConfig(
        num_heads=2,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_nope_head_dim=12,
        qk_rope_head_dim=8,
        v_head_dim=10,
        yarn=YarnConfig(factor=4, original_length=16, mscale=0.8, mscale_all_dim=0.707),
    ),
    moe=SMALL_MOE,
)

# What all small models are run with unless a test says otherwise.
RUNTIME = RuntimeConfig(dtype="float32", remat="none")
LOSS = LossConfig(balance=BalanceConfig(expert=0, device=0, communication=0))

# V2-Lite's shape: queries are not compressed, experts are chosen anywhere.
SMALL_LITE = replace(
    SMALL,
    attention=replace(SMALL.attention, q_lora_rank=None),
    moe=replace(SMALL_MOE, routing="greedy", num_groups=1, top_groups=1, routed_scale=1.0),
)


def random_model(
    config: ModelConfig,
    seed: int = 0,
    runtime: RuntimeConfig = RUNTIME,
    rules: ShardingRules | None = None,
    kernels: Kernels | None = None,
) -> DeepSeekV2:
    """Makes a model whose activations stay near 1, with random norms; the same on every mesh."""
    rng = np.random.default_rng(seed)
    graph, state = abstract_model(config, runtime, rules, kernels)
    shardings = {}
    if rules is not None and rules.mesh is not None:
        shardings = dict(nnx.to_flat_state(param_shardings(state, rules)))
    leaves = []
    for path, variable in nnx.to_flat_state(state):
        dims = variable.get_metadata("dims")
        if dims == ("norm",):
            values = rng.uniform(0.5, 1.5, variable.shape)
        else:
            fan_in = 1 if path[0] == "embed" else _fan_in(dims, variable.shape)
            gain = 2.0 if "router" in path else 1.3
            values = rng.standard_normal(variable.shape) * gain / np.sqrt(fan_in)
        sharding = shardings[path].get_value() if shardings else None
        array = jax.device_put(jnp.asarray(values, variable.dtype), sharding)
        leaves.append((path, variable.replace(array)))
    return nnx.merge(graph, nnx.from_flat_state(leaves))


def _fan_in(dims: tuple[str, ...], shape: tuple[int, ...]) -> int:
    """Returns how many numbers a projection of these logical dims sums into one."""
    own = shape[len(shape) - len(dims) :]  # without the dim of stacked layers
    if dims == ("heads", "head_dim", "param_embed"):
        return own[0] * own[1]
    return own[1] if dims[0] == "experts" else own[0]


def oracle_weights(model: DeepSeekV2) -> dict:
    """Returns the weights as the oracle takes them: float64, one dict a layer."""

    def array(variable: nnx.Variable) -> np.ndarray:
        return np.asarray(variable[...], np.float64)

    layers = []
    for stack in (model.dense_layers, model.moe_layers):
        if stack is None:
            continue
        attention, feed_forward = stack.attention, stack.feed_forward
        stacked = {
            "attention_norm": stack.attention_norm.weight,
            "feed_forward_norm": stack.feed_forward_norm.weight,
            "kv_norm": attention.kv_norm.weight,
            "w_gate": feed_forward.w_gate.weight,
            "w_up": feed_forward.w_up.weight,
            "w_down": feed_forward.w_down.weight,
        }
        for name in ("wq_nope", "wq_rope", "wkv_a", "wk_b", "wv_b", "wo"):
            stacked[name] = getattr(attention, name).weight
        if attention.wq_a is not None:
            assert attention.q_norm is not None
            stacked |= {"wq_a": attention.wq_a.weight, "q_norm": attention.q_norm.weight}
        if stack is model.moe_layers:
            assert isinstance(feed_forward, MoE)
            stacked["router"] = feed_forward.router.gate.weight
            if feed_forward.shared is not None:
                for name in ("gate", "up", "down"):
                    matrix = getattr(feed_forward.shared, f"w_{name}")
                    stacked[f"shared_{name}"] = matrix.weight
        arrays = {name: array(variable) for name, variable in stacked.items()}
        count = len(arrays["attention_norm"])
        layers += [{name: values[i] for name, values in arrays.items()} for i in range(count)]
    return {
        "embed": array(model.embed.weight),
        "norm": array(model.norm.weight),
        "lm_head": array(model.lm_head.weight),
        "layers": layers,
    }
