"""The whole model: forward, decode, gradients, remat and types, against the oracle and itself."""

import importlib
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsjax.config import RuntimeConfig, TokenDropping
from dsjax.configs.models import tiny
from dsjax.kernels import Kernels
from dsjax.layers.moe import Dropping
from dsjax.model import abstract_model, create_model
from tests import oracle
from tests.released_models import SIZES
from tests.small_models import (
    RUNTIME,
    SMALL,
    SMALL_LITE,
    SMALL_MOE,
    oracle_weights,
    random_model,
)

VARIANTS = {
    "v2": SMALL,
    "v2_lite": SMALL_LITE,
    # transformers ignores norm_topk_prob=true, so the oracle is its only check.
    "normalised": replace(
        SMALL, norm_eps=1e-3, moe=replace(SMALL_MOE, normalize_weights=True, routed_scale=9.0)
    ),
    "no_shared_experts": replace(SMALL, moe=replace(SMALL_MOE, num_shared_experts=0)),
    "dense": replace(SMALL_LITE, moe=None, num_dense_layers=2, num_layers=2),
    "no_dense_layer": replace(SMALL, num_dense_layers=0, num_layers=2),
    "plain_rope": replace(SMALL, attention=replace(SMALL.attention, yarn=None)),
}
LENGTH = 22


def make_batch():
    """Two packed documents in one row, a padded row, and a whole one."""
    rng = np.random.default_rng(5)
    segments = np.ones((3, LENGTH), np.int32)
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (3, 1))
    segments[0, 9:], positions[0, 9:] = 2, np.arange(LENGTH - 9)
    segments[1, 15:] = 0
    tokens = rng.integers(0, SMALL.vocab_size, (3, LENGTH)).astype(np.int32)
    targets = rng.integers(0, SMALL.vocab_size, (3, LENGTH)).astype(np.int32)
    return tokens, positions, segments, targets


@jax.jit
def forward(model, tokens, positions, segments):
    hidden, stats = model.hidden(tokens, positions, segments)
    return model.lm_head.logits(hidden), stats


@jax.jit
def loss_and_gradients(model, tokens, positions, segments, targets):
    def loss_of(model):
        hidden, stats = model.hidden(tokens, positions, segments)
        log_probs = jax.nn.log_softmax(model.lm_head.logits(hidden))
        nll = -jnp.take_along_axis(log_probs, targets[..., None], -1)[..., 0]
        mask = segments > 0
        loss = jnp.sum(nll * mask) / jnp.sum(mask)
        if stats is not None:
            loss += jnp.sum(0.3 * stats.expert + 0.2 * stats.device + 0.1 * stats.communication)
        return loss

    loss, gradients = jax.value_and_grad(loss_of)(model)
    return loss, nnx.state(gradients)


def oracle_loss(weights, config, tokens, positions, segments, targets):
    logits, stats = oracle.forward(weights, config, tokens, positions, segments)
    loss = oracle.cross_entropy(logits, targets, segments > 0)
    for scores, indices in stats:
        balance = oracle.balance_losses(scores, indices, segments > 0, config.moe)
        loss += float(balance @ [0.3, 0.2, 0.1])
    return loss


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.core) if n == "v2" else n for n in VARIANTS]
)
def test_forward_is_the_oracles(name):
    config = VARIANTS[name]
    model = random_model(config)
    tokens, positions, segments, _ = make_batch()
    want, routed = oracle.forward(oracle_weights(model), config, tokens, positions, segments)
    got, stats = forward(model, tokens, positions, segments)
    assert want.std() > 0.5
    assert got.dtype == jnp.float32
    valid = segments > 0
    np.testing.assert_allclose(np.asarray(got)[valid], want[valid], atol=3e-5)
    if config.moe is None:
        assert stats is None
        return
    for layer, (scores, indices) in enumerate(routed):
        losses = oracle.balance_losses(scores, indices, valid, config.moe)
        got_losses = [stats.expert[layer], stats.device[layer], stats.communication[layer]]
        np.testing.assert_allclose(got_losses, losses, rtol=1e-5)
        load = np.bincount(indices[valid].ravel(), minlength=config.moe.num_experts)
        np.testing.assert_array_equal(stats.load_E[layer], load)


def test_documents_of_a_row_do_not_see_one_another():
    model = random_model(SMALL)
    tokens, positions, segments, _ = make_batch()
    packed, _ = forward(model, tokens[:1], positions[:1], segments[:1])
    for part in (slice(0, 9), slice(9, LENGTH)):
        alone = jax.jit(lambda model, tokens: model(tokens))(model, tokens[:1, part])
        np.testing.assert_allclose(packed[:, part], alone, atol=2e-5)


def perturbed(weights, path, direction, step):
    """The oracle's weights with one array moved; `path` is a name, or a layer and a name."""
    weights = weights | {"layers": [dict(layer) for layer in weights["layers"]]}
    node = weights if len(path) == 1 else weights["layers"][path[0]]
    node[path[-1]] = node[path[-1]] + step * direction
    return weights


@pytest.mark.parametrize("name", ["v2", "v2_lite", "normalised"])
def test_gradients_are_the_oracles_finite_differences(name):
    """Every parameter's gradient along a random direction, against float64 differences."""
    config = VARIANTS[name]
    model = random_model(config)
    batch = make_batch()
    weights = oracle_weights(model)
    loss, gradients = loss_and_gradients(model, *batch)
    assert float(loss) == pytest.approx(oracle_loss(weights, config, *batch), rel=1e-5)
    # The gradients as the oracle's dicts, by giving them to a model's place.
    graph, _ = nnx.split(model)
    slopes = oracle_weights(nnx.merge(graph, gradients))
    rng, step = np.random.default_rng(2), 1e-5
    paths: list[tuple] = [("embed",), ("norm",), ("lm_head",)]
    paths += [(number, key) for number in (0, 2) for key in weights["layers"][number]]
    assert len(paths) > 25
    for path in paths:
        slope = slopes[path[0]] if len(path) == 1 else slopes["layers"][path[0]][path[1]]
        # Along the gradient itself, so that the slope is as large as it gets, with some noise.
        direction = slope + np.abs(slope).mean() * rng.standard_normal(slope.shape)
        direction /= np.linalg.norm(direction)
        ahead, behind = (
            oracle_loss(perturbed(weights, path, direction, sign * step), config, *batch)
            for sign in (1, -1)
        )
        want = (ahead - behind) / (2 * step)
        assert want > 1e-4, path
        assert np.sum(slope * direction) == pytest.approx(want, rel=2e-3), path


def test_the_plain_kernels_give_the_same_gradients():
    reference = Kernels(mla_attention="reference", grouped_matmul="reference")
    batch = make_batch()
    loss, gradients = loss_and_gradients(random_model(SMALL), *batch)
    want_loss, want = loss_and_gradients(random_model(SMALL, kernels=reference), *batch)
    assert float(loss) == pytest.approx(float(want_loss), rel=1e-6)
    for got, expected in zip(jax.tree.leaves(gradients), jax.tree.leaves(want), strict=True):
        scale = float(jnp.abs(expected).max())
        np.testing.assert_allclose(got, expected, atol=2e-5 * scale)


@pytest.mark.parametrize("policy", ["full", "save_dots", "save_attention"])
def test_recomputation_changes_nothing(policy):
    batch = make_batch()
    loss, gradients = loss_and_gradients(random_model(SMALL), *batch)
    again, recomputed = loss_and_gradients(
        random_model(SMALL, runtime=replace(RUNTIME, remat=policy)), *batch
    )
    assert float(again) == pytest.approx(float(loss), rel=1e-6)
    for got, want in zip(jax.tree.leaves(recomputed), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-6 * float(jnp.abs(want).max()))


@pytest.mark.core
@pytest.mark.parametrize("policy", ["none", "save_attention"])
def test_layers_by_themselves_compute_what_a_loop_does(policy):
    """Forward and backward, without a loop over the layers in the program."""
    batch, runtime = make_batch(), replace(RUNTIME, remat=policy)
    loop, unrolled = (
        random_model(SMALL, runtime=runtime, kernels=Kernels(unroll_layers=unroll))
        for unroll in (False, True)
    )
    loss, gradients = loss_and_gradients(loop, *batch)
    again, by_layer = loss_and_gradients(unrolled, *batch)
    assert float(again) == pytest.approx(float(loss), rel=1e-6)
    for got, want in zip(jax.tree.leaves(by_layer), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-6 * float(jnp.abs(want).max()))

    def loops_over_layers(model):
        text = loss_and_gradients.lower(model, *batch).as_text()
        weights = "x".join(map(str, model.moe_layers.attention.wo.weight.shape))
        return sum(weights in line for line in text.splitlines() if "stablehlo.while" in line)

    assert loops_over_layers(loop) == 2
    assert loops_over_layers(unrolled) == 0


def test_bfloat16_is_close_to_float32():
    tokens, positions, segments, _ = make_batch()
    exact, _ = forward(random_model(SMALL_LITE), tokens, positions, segments)
    model = random_model(SMALL_LITE, runtime=replace(RUNTIME, dtype="bfloat16"))
    rounded, stats = forward(model, tokens, positions, segments)
    assert rounded.dtype == jnp.float32
    assert stats.expert.dtype == jnp.float32
    # A token whose best experts lie close together may change experts: look at the bulk.
    difference = np.abs(np.asarray(rounded) - np.asarray(exact))
    assert np.median(difference) < 0.03
    assert np.quantile(difference, 0.9) < 0.3
    hidden, _ = jax.eval_shape(model.hidden, tokens, positions, segments)
    assert hidden.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(model)))


@pytest.mark.core
@pytest.mark.parametrize("field", ["dtype", "param_dtype"])
def test_float16_is_refused(field):
    # Trap: float16 overflows on the 236B model.
    with pytest.raises(
        ValueError, match=rf"runtime.{field}='float16': must be float32 or bfloat16"
    ):
        RuntimeConfig(**{field: "float16"})  # type: ignore[arg-type]


def test_dropping_changes_training_and_nothing_else():
    model = random_model(SMALL)
    tokens, positions, segments, _ = make_batch()
    run = jax.jit(lambda model, *args: model.hidden(*args))
    free, stats = run(model, tokens, positions, segments, None)
    dropping = Dropping(jnp.zeros(len(tokens), bool), TokenDropping(0.5))
    tight, dropped = run(model, tokens, positions, segments, dropping)
    assert float(jnp.abs(free - tight).max()) > 0.1
    assert np.all(np.asarray(stats.dropped) == 0)
    assert np.all(np.asarray(dropped.dropped) > 0.2)


@pytest.mark.slow
def test_create_model_draws_every_weight_alike():
    config = replace(tiny.config, num_layers=2)
    model = create_model(config, seed=3)
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        values = np.asarray(variable[...])
        if "norm" in variable.get_metadata("dims"):
            np.testing.assert_array_equal(values, 1)
        else:
            assert values.std() == pytest.approx(config.init_std, rel=0.06), path
            assert abs(values.mean()) < 5 * config.init_std / np.sqrt(values.size), path
    assert model.moe_layers is not None
    feed_forward = model.moe_layers.feed_forward
    assert not np.array_equal(feed_forward.w_gate.stored(), feed_forward.w_up.stored())


@pytest.mark.core
@pytest.mark.parametrize("name", SIZES)
def test_the_released_models_have_their_size(name: str):
    config = importlib.import_module(f"dsjax.configs.models.{name}").config
    _, state = abstract_model(config)
    leaves = [variable for _, variable in nnx.to_flat_state(state)]
    assert sum(int(np.prod(v.shape, dtype=np.int64)) for v in leaves) == SIZES[name].parameters
