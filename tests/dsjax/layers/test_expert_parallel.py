"""The experts of one device in passes, and of a mesh: any room and any chunks give one result."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.config import MeshConfig, MoEConfig
from dsjax.configs.models import deepseek_v2, deepseek_v2_lite
from dsjax.kernels import Kernels
from dsjax.layers.moe.dispatch import exchange_room, max_shards
from dsjax.layers.moe.experts import ExpertWeights, apply_experts_to_rows
from dsjax.layers.moe.layer import apply_experts
from dsjax.layers.moe.passes import sum_passes
from dsjax.layers.moe.router import Routing, choose_experts
from dsjax.layers.options import LayerOptions
from dsjax.mesh import ShardingRules, inference_rules, make_mesh, train_rules
from dsjax.plan import count_collectives
from tests.small_models import RUNTIME, SMALL

TOKENS, TOP_K, EXPERTS, WIDTH, HIDDEN = 24, 3, 4, 16, 8


def draw_layer(rng, tokens, experts):
    x = rng.standard_normal((tokens, WIDTH))
    gates = rng.random((tokens, TOP_K))
    weights = [
        rng.standard_normal(shape) / 4
        for shape in ((experts, WIDTH, HIDDEN), (experts, WIDTH, HIDDEN), (experts, HIDDEN, WIDTH))
    ]
    return [jnp.asarray(a, jnp.float32) for a in (x, gates, *weights)]


def draw_choices(rng, share_here, num_tokens=TOKENS):
    """Different experts of each token; `EXPERTS` for the share that is elsewhere."""
    experts = np.stack([rng.permutation(EXPERTS)[:TOP_K] for _ in range(TOKENS)])
    experts[rng.random(experts.shape) >= share_here] = EXPERTS
    experts[num_tokens:] = EXPERTS
    return experts.astype(np.int32)


@functools.partial(jax.jit, static_argnames="num_rows")
def run_passes(arguments, experts_NK, probe_ND, num_rows):
    """All passes over windows of `num_rows` rows; one over all of them where there is room."""

    def window(index, experts_NK, values):
        x_ND, gates_NK, weights = values
        first = index * num_rows
        return apply_experts_to_rows(
            x_ND, experts_NK, gates_NK, weights, first, num_rows, Kernels()
        )

    def run(x_ND, gates_NK, *weights):
        values = (x_ND, gates_NK, ExpertWeights(*weights))
        passes = None
        if num_rows < TOKENS * TOP_K:
            passes = -(-jnp.sum(experts_NK < EXPERTS) // num_rows)
        first = functools.partial(window, 0)
        return sum_passes(first, window, passes, experts_NK, values)

    out_ND, pull = jax.vjp(run, *arguments)
    return out_ND, pull(probe_ND)


# A row a pass; fewer than a token has; windows that end within the rows, and behind them.
@pytest.mark.parametrize("num_rows", [1, 2, 7, 50])
def test_passes_of_any_size_give_one_result(num_rows, rng):
    for share_here, num_tokens in ((0.5, TOKENS), (1.0, 17), (0.1, TOKENS), (0.0, TOKENS)):
        arguments = draw_layer(rng, TOKENS, EXPERTS)
        experts = draw_choices(rng, share_here, num_tokens)
        probe = jnp.asarray(rng.standard_normal((TOKENS, WIDTH)), jnp.float32)
        want = run_passes(arguments, experts, probe, TOKENS * TOP_K)
        got = run_passes(arguments, experts, probe, num_rows)
        assert (np.abs(want[0]).max() > 0) == (share_here > 0)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.core
@pytest.mark.parametrize(
    ("config", "shards", "bound"),
    [
        (deepseek_v2.config.moe, 8, 3),  # the paper's: a group on each device
        (deepseek_v2.config.moe, 4, 3),
        (deepseek_v2.config.moe, 2, 2),
        (deepseek_v2.config.moe, 16, 6),
        (deepseek_v2.config.moe, 5, 5),  # 32 experts a device, 20 a group: groups straddle
        (deepseek_v2.config.moe, 160, 6),
        (deepseek_v2_lite.config.moe, 8, 6),
        (deepseek_v2_lite.config.moe, 4, 4),
    ],
)
def test_bound_on_the_devices_of_a_token(config, shards, bound, rng):
    assert max_shards(config, shards) == bound
    scores = jax.nn.softmax(jnp.asarray(rng.standard_normal((2, 500, config.num_experts))))
    _, indices = choose_experts(scores, config)
    devices = np.asarray(indices) // (config.num_experts // shards)
    assert max(len(set(token)) for token in devices.reshape(-1, config.top_k).tolist()) <= bound


MOE = MoEConfig(
    num_experts=8,
    top_k=TOP_K,
    intermediate_dim=HIDDEN,
    num_groups=4,
    top_groups=2,
    routing="group_limited_greedy",
)
BATCH, LENGTH = 8, 6


@functools.partial(jax.jit, static_argnames=("config", "options"))
def run_layer(x_BTD, gates_BTK, indices_BTK, weights, probe_BTD, config, options):
    def run(x_BTD, gates_BTK, *weights):
        routing = Routing(gates_BTK, indices_BTK)
        experts, shared = ExpertWeights(*weights[:3]), ExpertWeights(*weights[3:])
        return apply_experts(x_BTD, routing, experts, shared, config, options)

    out_BTD, pull = jax.vjp(run, x_BTD, gates_BTK, *weights)
    return out_BTD, pull(probe_BTD)


def draw_routed_layer(rng, config, skew=0.0):
    x, gates, *weights = draw_layer(rng, BATCH * LENGTH, config.num_experts)
    for shape in ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH)):  # the shared experts
        weights.append(jnp.asarray(rng.standard_normal(shape) / 4, jnp.float32))
    scores = rng.standard_normal((BATCH, LENGTH, config.num_experts))
    scores[..., 2] += skew
    _, indices = choose_experts(jax.nn.softmax(jnp.asarray(scores)), config)
    probe = jnp.asarray(rng.standard_normal((BATCH, LENGTH, WIDTH)), jnp.float32)
    # Some are dropped, as the token-dropping option does it.
    indices = jnp.where(jnp.arange(LENGTH)[:, None] == 4, config.num_experts, indices)
    gates = gates.reshape(indices.shape)
    return x.reshape(probe.shape), gates, indices, weights, probe


def options_of(rules, **kernels):
    return LayerOptions.of(SMALL, RUNTIME, rules, Kernels(**kernels))


@pytest.mark.parametrize(
    ("mesh", "kernels"),
    [
        (MeshConfig(data=1, fsdp=2, expert=2, tensor=2), {"exchange_chunks": 3}),
        (MeshConfig(data=2, fsdp=1, expert=4), {"exchange_room": 0.2, "exchange_chunks": 2}),
    ],
)
def test_chunks_and_room_change_nothing(mesh, kernels, rng):
    batch = draw_routed_layer(rng, MOE, skew=4.0)
    want = run_layer(*batch, MOE, options_of(ShardingRules()))
    got = run_layer(*batch, MOE, options_of(train_rules(make_mesh(mesh)), pass_step=1, **kernels))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


def test_all_tokens_to_one_device_are_exact(rng):
    """In as many passes as that takes, which all devices know of before they exchange anything."""
    x, gates, _, weights, probe = draw_routed_layer(rng, MOE)
    indices = jnp.broadcast_to(jnp.asarray([4, 5, 8]), gates.shape)  # 8 is no expert
    batch = (x, gates, indices, weights, probe)
    want = run_layer(*batch, MOE, options_of(ShardingRules()))
    rules = train_rules(make_mesh(MeshConfig(data=2, fsdp=1, expert=4)))
    got = run_layer(*batch, MOE, options_of(rules, exchange_room=0.5, pass_step=1))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


@pytest.mark.core
@pytest.mark.parametrize("shards", [32, 64])
def test_room_to_receive_goes_with_the_mean(shards):
    """V2 over many devices, of 4,096 tokens each: the worst case would be 2.7 GB on 64."""
    model = deepseek_v2.config
    assert model.moe is not None
    tokens = exchange_room(model.moe, Kernels(), shards, 4096)
    assert tokens * model.hidden_dim * 2 < 300e6
    assert exchange_room(model.moe, Kernels(exchange_room=99), shards, 4096) == 4096 * shards


def test_chunks_that_do_not_divide_the_tokens(rng):
    rules = train_rules(make_mesh(MeshConfig(fsdp=1, expert=4, tensor=2)))
    with pytest.raises(ValueError, match="exchange_chunks=5: must divide a device's 12 tokens"):
        run_layer(*draw_routed_layer(rng, MOE), MOE, options_of(rules, exchange_chunks=5))


def kinds(uses):
    """The kinds of collectives, whatever they run over."""
    return {name.partition(" over ")[0] for name in uses}


def test_tokens_that_move_would_be_seen(rng):
    """The control of the test below: tokens that are divided over devices are exchanged."""
    rules = train_rules(make_mesh(MeshConfig(fsdp=1, expert=4, tensor=2)))
    lowered = run_layer.lower(*draw_routed_layer(rng, MOE), MOE, options_of(rules))
    text = lowered.compile().as_text()
    assert text is not None
    assert kinds(count_collectives(text)) > {"all-reduce"}


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("pass_step", [128, 1])
def test_decoding_sums_over_the_devices_once_and_moves_no_token(stacked, pass_step, rng):
    """Few tokens, not divided: each device reads its experts once; one sum is all they exchange."""
    rules = inference_rules(make_mesh(MeshConfig(fsdp=1, expert=4, tensor=2)))
    options = options_of(rules, pass_step=pass_step)
    x, gates, indices, weights, _ = draw_routed_layer(rng, MOE)

    @functools.partial(jax.jit, static_argnames="options")
    def run(x_BTD, gates_BTK, indices_BTK, weights, options):
        routing = Routing(gates_BTK, indices_BTK)
        experts, shared = ExpertWeights(*weights[:3]), ExpertWeights(*weights[3:])
        if stacked:  # the second of two layers
            layer = indices_BTK[0, 0, 0] * 0 + 1
            gate, up, down = (jnp.stack([jnp.full_like(w, jnp.nan), w]) for w in weights[:3])
            experts = ExpertWeights(gate, up, down, layer)
        return apply_experts(x_BTD, routing, experts, shared, MOE, options)

    def shard(array, *dims):
        return jax.device_put(array, rules.sharding(*dims))

    arguments = (x, gates, indices)
    on_mesh = [shard(a, "batch", "length", None) for a in arguments]
    into, out = ("experts", "expert_embed", "mlp"), ("experts", "mlp", "expert_embed")
    dims = (into, into, out, into[1:], into[1:], out[1:])
    on_mesh.append([shard(w, *each) for w, each in zip(weights, dims, strict=True)])
    compiled = run.lower(*on_mesh, options=options).compile()
    want = run(*arguments, weights, options_of(ShardingRules()))
    text = compiled.as_text()
    assert text is not None
    uses = count_collectives(text)
    assert kinds(uses) == {"all-reduce"}
    # However it is cut up, each of eight devices sends what one sum of the result takes.
    assert sum(use.bytes for use in uses.values()) == 2 * want.nbytes * 7 // 8
    np.testing.assert_allclose(compiled(*on_mesh), want, rtol=1e-5, atol=1e-5)
