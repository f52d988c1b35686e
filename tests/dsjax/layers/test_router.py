"""The router, its balance losses and token dropping against the paper's equations."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsjax.config import MoEConfig, TokenDropping
from dsjax.kernels import Kernels
from dsjax.layers.moe.balance import Dropping, balance_losses, keep_within_capacity
from dsjax.layers.moe.router import (
    MOST_COMPARED,
    Router,
    choose_experts,
    mean_entropy,
    router_logits,
)
from dsjax.layers.options import LayerOptions
from dsjax.mesh import ShardingRules
from tests import oracle
from tests.small_models import RUNTIME, SMALL

losses_of = jax.jit(balance_losses, static_argnames="config")
choose = jax.jit(choose_experts, static_argnames=("config", "compare"))
keep_of = jax.jit(keep_within_capacity, static_argnames=("config", "rules"))
run_router = jax.jit(lambda router, *args, dropping: router(*args, dropping))


def moe_config(experts, top_k, groups, top_groups, routing, **fields):
    return MoEConfig(
        num_experts=experts,
        top_k=top_k,
        intermediate_dim=8,
        num_groups=groups,
        top_groups=top_groups,
        routing=routing,
        **fields,
    )


CASES = {
    "v2": moe_config(160, 6, 8, 3, "group_limited_greedy", routed_scale=16.0),
    "v2_lite": moe_config(64, 6, 1, 1, "greedy"),
    "greedy_in_groups": moe_config(16, 4, 4, 3, "greedy", routed_scale=1.7),
    "normalised": moe_config(
        12, 3, 3, 2, "group_limited_greedy", normalize_weights=True, routed_scale=5.0
    ),
    "normalised_greedy": moe_config(8, 2, 1, 1, "greedy", normalize_weights=True),
    "top_1": moe_config(6, 1, 2, 1, "group_limited_greedy"),
    "normalised_top_1": moe_config(6, 1, 1, 1, "greedy", normalize_weights=True, routed_scale=2.0),
    "all_of_a_group": moe_config(8, 4, 2, 1, "group_limited_greedy"),
    "one_expert_a_group": moe_config(5, 3, 5, 3, "group_limited_greedy"),
}


def affinities(config, rng, batch=3, length=17, spread=2.0):
    return oracle.softmax(spread * rng.standard_normal((batch, length, config.num_experts)))


def padding_mask(batch, length):
    """Sequences of different lengths; the last one is complete."""
    lengths = np.linspace(length // 3, length, batch).astype(int)
    return np.arange(length) < lengths[:, None]


def set_gate(router, values):
    router.gate.weight[...] = jnp.asarray(values, jnp.float32)


@pytest.mark.core
@pytest.mark.parametrize("name", CASES)
def test_router_is_the_oracles(name, rng):
    config, hidden = CASES[name], 24
    options = LayerOptions.of(SMALL, RUNTIME, ShardingRules(), Kernels())
    router = Router(config, hidden, options, nnx.Rngs(0))
    x, weight = (
        rng.standard_normal((2, 13, hidden)),
        rng.standard_normal((hidden, config.num_experts)),
    )
    set_gate(router, weight)
    routing, stats = run_router(router, jnp.asarray(x, jnp.float32), None, dropping=None)
    everything = np.ones((2, 13), bool)
    routed = [oracle.route(sequence, weight, config) for sequence in x]
    scores, indices, gates = map(np.stack, zip(*routed, strict=True))
    np.testing.assert_array_equal(routing.indices_BTK, indices)
    np.testing.assert_allclose(routing.gates_BTK, gates, rtol=1e-4, atol=1e-7)
    losses = oracle.balance_losses(scores, indices, everything, config)
    np.testing.assert_allclose([stats.expert, stats.device, stats.communication], losses, rtol=1e-5)
    np.testing.assert_array_equal(
        stats.load_E, np.bincount(indices.ravel(), minlength=config.num_experts)
    )
    assert stats.dropped == 0


def test_scale_or_normalisation_but_not_both(rng):
    # Trap: routed_scaling_factor applied twice, or never; transformers ignores norm_topk_prob.
    scaled = CASES["v2"]
    scores = jnp.asarray(affinities(scaled, rng), jnp.float32)
    weights, indices = choose(scores, scaled)
    plain, same = choose(scores, replace(scaled, routed_scale=1.0))
    np.testing.assert_array_equal(indices, same)
    np.testing.assert_allclose(weights, 16 * plain, rtol=1e-6)
    chosen = np.take_along_axis(np.asarray(scores), np.asarray(indices), -1)
    np.testing.assert_allclose(plain, chosen, rtol=1e-6)
    normalised, _ = choose(scores, replace(scaled, normalize_weights=True))
    np.testing.assert_allclose(normalised.sum(-1), 1, rtol=1e-6)
    # Trap: of one expert a token the normalised gate is 1, from which the router learns nothing.
    single = replace(scaled, top_k=1, top_groups=1)
    alone, _ = choose(scores, replace(single, normalize_weights=True))
    np.testing.assert_array_equal(alone, choose(scores, single)[0])
    np.testing.assert_allclose(alone[..., 0], 16 * scores.max(-1), rtol=1e-6)


def test_tokens_stay_within_their_groups(rng):
    config = CASES["v2"]
    _, indices = choose(jnp.asarray(affinities(config, rng, 4, 64), jnp.float32), config)
    groups = np.asarray(indices) // (config.num_experts // config.num_groups)
    counts = [len(set(token)) for token in groups.reshape(-1, config.top_k).tolist()]
    assert max(counts) == config.top_groups
    for token in np.asarray(indices).reshape(-1, config.top_k).tolist():
        assert len(set(token)) == config.top_k


def test_masked_groups_lose_to_any_affinity():
    # Trap: masking groups with 0. Here the kept group's other experts have no affinity at all.
    config = moe_config(6, 3, 2, 1, "group_limited_greedy")
    scores = jnp.array([[[0.6, 0.0, 0.0, 0.2, 0.1, 0.1]]], jnp.float32)
    _, indices = choose(scores, config)
    assert sorted(np.asarray(indices)[0, 0].tolist()) == [0, 1, 2]


@pytest.mark.core
@pytest.mark.parametrize("name", CASES)
def test_comparing_chooses_what_sorting_chooses(name, rng):
    """Of equal affinities the earlier expert comes first; NaN gives experts that there are."""
    config = CASES[name]
    scores = affinities(config, rng).astype(np.float32)
    scores[0] = np.round(scores[0] * config.num_experts) / config.num_experts
    scores[1, :2] = 1 / config.num_experts
    want_gates, want = choose(jnp.asarray(scores), config)
    gates, indices = choose(jnp.asarray(scores), config, compare=True)
    np.testing.assert_array_equal(indices, want)
    np.testing.assert_allclose(gates, want_gates, rtol=1e-6)  # normalised, sums are rounded
    _, indices = choose(jnp.full_like(scores, jnp.nan), config, compare=True)
    assert np.all((np.asarray(indices) >= 0) & (np.asarray(indices) < config.num_experts))


def test_only_few_tokens_are_compared():
    """A sort of more: comparisons are as many as the experts' square."""
    config = CASES["v2_lite"]
    few = MOST_COMPARED // config.num_experts**2
    for tokens, sorts in ((few, False), (few + 1, True)):
        scores = jax.ShapeDtypeStruct((1, tokens, config.num_experts), jnp.float32)
        run = functools.partial(choose_experts, config=config, compare=True)
        text = str(jax.make_jaxpr(run)(scores))
        assert ("top_k[" in text) == sorts


@pytest.mark.core
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_balance_losses_are_the_papers(name, masked, rng):
    config = CASES[name]
    scores = affinities(config, rng)
    mask = padding_mask(*scores.shape[:2]) if masked else np.ones(scores.shape[:2], bool)
    _, indices = choose(jnp.asarray(scores, jnp.float32), config)
    *losses, load = losses_of(jnp.asarray(scores, jnp.float32), indices, jnp.asarray(mask), config)
    want = oracle.balance_losses(scores, np.asarray(indices), mask, config)
    np.testing.assert_allclose(losses, want, rtol=1e-5)
    chosen = np.asarray(indices)[mask].ravel()
    np.testing.assert_array_equal(load, np.bincount(chosen, minlength=config.num_experts))


def test_entropy_is_of_the_tokens_affinities_in_nats_and_has_no_gradient(rng):
    logits = 3 * rng.standard_normal((3, 17, 12))
    logits[0, 0] = 200 * np.eye(12)[3]  # one expert alone: 0, not NaN
    mask = padding_mask(3, 17)
    scores = oracle.softmax(logits)
    entropy = -np.sum(scores * np.log(np.maximum(scores, 1e-300)), axis=-1)
    found = mean_entropy(jnp.float32(logits), jnp.float32(scores), jnp.asarray(mask))
    np.testing.assert_allclose(found, entropy[mask].mean(), rtol=1e-5)
    even = jnp.zeros((1, 4, 12))
    np.testing.assert_allclose(
        mean_entropy(even, even + 1 / 12, jnp.ones((1, 4), bool)), np.log(12), rtol=1e-6
    )
    gradient = jax.grad(lambda x: mean_entropy(x, jax.nn.softmax(x), jnp.asarray(mask)))
    assert not np.any(gradient(jnp.float32(logits)))


def test_losses_are_per_sequence(rng):
    """The batch's loss is the mean of its sequences', and not the loss of the joined batch."""
    config = CASES["greedy_in_groups"]
    scores = jnp.asarray(affinities(config, rng, 4, 16), jnp.float32)
    _, indices = choose(scores, config)
    mask = jnp.ones(scores.shape[:2], bool)

    def losses(*arrays):
        return np.array(losses_of(*arrays, config)[:3])

    single = [losses(*(a[b : b + 1] for a in (scores, indices, mask))) for b in range(4)]
    np.testing.assert_allclose(losses(scores, indices, mask), np.mean(single, axis=0), rtol=1e-6)
    joined = losses(*(a.reshape(1, -1, *a.shape[2:]) for a in (scores, indices, mask)))
    assert np.abs(losses(scores, indices, mask) - joined).min() > 1e-3


def test_even_routing_has_loss_1():
    config = moe_config(8, 2, 4, 2, "greedy")
    tokens = np.arange(8)
    indices = jnp.asarray(np.stack([tokens, (tokens + 2) % 8], axis=-1))[None]
    scores = jnp.full((1, 8, 8), 1 / 8, jnp.float32)
    losses = losses_of(scores, indices, jnp.ones((1, 8), bool), config)[:3]
    np.testing.assert_allclose(losses, 1, rtol=1e-6)


def test_affinities_are_a_single_softmax(rng):
    # Trap: softmax applied twice before the balance loss, which would pull every P_i to 1 / E.
    config = CASES["v2_lite"]
    options = LayerOptions.of(SMALL, RUNTIME, ShardingRules(), Kernels())
    router = Router(config, 16, options, nnx.Rngs(0))
    router.gate.weight[...] = 8 * jnp.asarray(
        rng.standard_normal(router.gate.weight.shape), jnp.float32
    )
    x = jnp.asarray(rng.standard_normal((1, 9, 16)), jnp.float32)
    weights = run_router(router, x, None, dropping=None)[0].gates_BTK
    scores = oracle.softmax(np.asarray(x[0] @ router.gate.weight[...], np.float64))
    np.testing.assert_allclose(weights[0, :, 0], scores.max(-1), rtol=1e-4)
    assert scores.max(-1).min() > 0.3


def test_balance_gradient_reaches_the_router_weight_through_the_mean_affinity(rng):
    config = CASES["normalised"]
    scores = jnp.asarray(affinities(config, rng, 2, 11), jnp.float32)
    _, indices = choose(scores, config)
    mask = jnp.ones((2, 11), bool)
    gradient = jax.jit(jax.grad(lambda s: balance_losses(s, indices, mask, config)[0]))(scores)
    chosen = np.asarray(indices)
    for b in range(2):  # d loss / d s_it = f_i / T / batch
        load = np.bincount(chosen[b].ravel(), minlength=config.num_experts)
        f = load * config.num_experts / (config.top_k * 11)
        np.testing.assert_allclose(gradient[b], np.tile(f / 11 / 2, (11, 1)), rtol=1e-5)


DROPPING = {
    "paper": TokenDropping(1.0, 0.1),
    "nothing_exempt": TokenDropping(1.0, 0.0),
    "tight": TokenDropping(0.5, 0.25),
    "roomy": TokenDropping(4.0, 0.0),
    "all_exempt": TokenDropping(0.1, 1.0),
    "of_two_sequences": TokenDropping(0.8, 0.25, budget_rows=2),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dropping", DROPPING)
@pytest.mark.parametrize("name", ["v2", "greedy_in_groups", "normalised"])
def test_dropping_is_the_papers(name, dropping, masked, rng):
    config, option = CASES[name], DROPPING[dropping]
    scores = affinities(config, rng, batch=8, length=9, spread=1.0)
    mask = padding_mask(8, 9) if masked else np.ones((8, 9), bool)
    _, indices = choose(jnp.asarray(scores, jnp.float32), config)
    exempt = rng.random(8) < option.undropped_fraction
    budget_rows = option.budget_rows or 8
    keep = keep_of(
        jnp.asarray(scores, jnp.float32),
        indices,
        jnp.asarray(mask),
        config,
        Dropping(jnp.asarray(exempt), option),
        ShardingRules(),
    )
    for first in range(0, 8, budget_rows):
        rows = slice(first, first + budget_rows)
        want = oracle.kept_assignments(
            scores[rows],
            np.asarray(indices)[rows],
            mask[rows],
            set(np.flatnonzero(exempt[rows])),
            config,
            option.capacity_factor,
        )
        np.testing.assert_array_equal(np.asarray(keep)[rows][mask[rows]], want[mask[rows]])


def test_dropped_assignments_go_nowhere(rng):
    config = CASES["greedy_in_groups"]
    options = LayerOptions.of(SMALL, RUNTIME, ShardingRules(), Kernels())
    router = Router(config, 16, options, nnx.Rngs(0))
    router.gate.weight[...] = jnp.asarray(
        rng.standard_normal(router.gate.weight.shape), jnp.float32
    )
    x = jnp.asarray(rng.standard_normal((4, 12, 16)), jnp.float32)
    mask = jnp.asarray(padding_mask(4, 12))
    free, stats_free = run_router(router, x, mask, dropping=None)
    exempt = jnp.asarray([True, False, False, False])
    routing, stats = run_router(router, x, mask, dropping=Dropping(exempt, TokenDropping(1.0)))
    lost = np.asarray(routing.indices_BTK) == config.num_experts
    assert lost[np.asarray(mask)].any()
    assert not lost[0][np.asarray(mask[0])].any()
    np.testing.assert_array_equal(np.asarray(routing.gates_BTK)[lost], 0)
    np.testing.assert_array_equal(
        np.asarray(routing.gates_BTK)[~lost], np.asarray(free.gates_BTK)[~lost]
    )
    for routed in (free, routing):  # padding goes nowhere, whether anything is dropped or not
        assert (np.asarray(routed.indices_BTK)[~np.asarray(mask)] == config.num_experts).all()
        assert not np.asarray(routed.gates_BTK)[~np.asarray(mask)].any()
    assert (np.asarray(free.indices_BTK)[np.asarray(mask)] < config.num_experts).all()
    _, nothing = run_router(router, x, mask & False, dropping=Dropping(exempt, TokenDropping()))
    assert float(nothing.dropped) == 0
    share = lost[np.asarray(mask)].mean()
    assert float(stats.dropped) == pytest.approx(share, rel=1e-6)
    # The losses and the load are of the router's wishes, before anything is dropped.
    assert float(stats.expert) == float(stats_free.expert)
    np.testing.assert_array_equal(stats.load_E, stats_free.load_E)


def test_router_computes_in_float32_under_bfloat16(rng):
    config = CASES["v2"]
    options = LayerOptions.of(SMALL, replace(RUNTIME, dtype="bfloat16"), ShardingRules(), Kernels())
    router = Router(config, 64, options, nnx.Rngs(0))
    router.gate.weight[...] = (
        jnp.asarray(rng.standard_normal(router.gate.weight.shape), jnp.float32) / 8
    )
    x = jnp.asarray(rng.standard_normal((1, 50, 64)), jnp.bfloat16)
    routing, _ = run_router(router, x, None, dropping=None)
    assert routing.gates_BTK.dtype == jnp.float32
    _, indices, gates = oracle.route(
        np.asarray(x[0], np.float64), np.asarray(router.gate.weight[...], np.float64), config
    )
    np.testing.assert_array_equal(routing.indices_BTK[0], indices)
    np.testing.assert_allclose(routing.gates_BTK[0], gates, rtol=1e-5)


@pytest.mark.parametrize("length", [48, 200])
@pytest.mark.parametrize("weight_dtype", [jnp.bfloat16, jnp.float32])
def test_logits_of_bfloat16_tokens_are_float32s(weight_dtype, length, rng):
    """Products of bfloat16 terms lose nothing that float32 would have, forward and backward.

    Of few tokens, whose width is divided into parts, and of many.
    """
    x_BTD = jnp.asarray(rng.standard_normal((2, length, 96)), jnp.bfloat16)
    weight_DE = jnp.asarray(rng.standard_normal((96, 24)), weight_dtype)
    probe_BTE = jnp.asarray(rng.standard_normal((2, length, 24)), jnp.float32)
    terms = functools.partial(router_logits, implementation="bfloat16_terms")
    logits_BTE, pull = jax.vjp(terms, x_BTD, weight_DE)
    d_x_BTD, d_weight_DE = pull(probe_BTE)
    x, weight, probe = (np.asarray(each, np.float64) for each in (x_BTD, weight_DE, probe_BTE))
    assert logits_BTE.dtype == jnp.float32
    np.testing.assert_allclose(logits_BTE, x @ weight, rtol=0, atol=2e-5)
    # Gradients have their argument's dtype, and its rounding alone.
    assert (d_x_BTD.dtype, d_weight_DE.dtype) == (jnp.bfloat16, weight_dtype)
    want = probe @ weight.T
    np.testing.assert_allclose(
        np.asarray(d_x_BTD, np.float64), want, rtol=2**-8, atol=2**-12 * np.abs(want).max()
    )
    want = np.einsum("btd,bte->de", x, probe)
    rtol, atol = (2**-8, 1e-4) if weight_dtype == jnp.bfloat16 else (0, 2e-5)
    np.testing.assert_allclose(np.asarray(d_weight_DE, np.float64), want, rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    ("implementation", "message"),
    [("bfloat16_terms", "dtype float32 must be bfloat16"), ("bf16", "implementation: 'bf16'")],
)
def test_logits_refuse_what_they_cannot_take(implementation, message):
    with pytest.raises(ValueError, match=message):
        router_logits(jnp.zeros((1, 2, 4)), jnp.zeros((4, 3)), implementation=implementation)
