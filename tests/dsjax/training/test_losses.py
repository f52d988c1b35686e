"""Cross entropy in chunks: its value, its gradient and the memory it takes."""

import functools
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.config import BalanceConfig, LossConfig, MeshConfig
from dsjax.layers.linear import float32_matmul
from dsjax.layers.moe import RouterStats
from dsjax.mesh import ShardingRules, make_mesh, train_rules
from dsjax.plan import count_collectives
from dsjax.training.losses import balance_terms, sum_cross_entropy, training_loss
from tests.small_models import SMALL, SMALL_MOE, random_model


def with_head(weight_DW: jax.Array):
    """What the loss needs of a model: an output head over a vocabulary of any size."""
    head = SimpleNamespace(stored=lambda: weight_DW, logits=float32_matmul)
    return SimpleNamespace(lm_head=head, options=SimpleNamespace(rules=ShardingRules()))


def direct(weight_DW, hidden_BTD, targets_BT, weights_BT):
    logits_BTW = hidden_BTD @ weight_DW
    log_z_BT = jax.nn.logsumexp(logits_BTW, axis=-1)
    target_BT = jnp.take_along_axis(logits_BTW, targets_BT[..., None], -1)[..., 0]
    nats = jnp.sum((log_z_BT - target_BT) * weights_BT)
    return nats, jnp.sum(log_z_BT**2 * weights_BT)


def test_with_a_gradient_a_chunk_has_three_products_of_the_head(rng):
    """Its logits and the two gradients: nothing is multiplied again."""
    shapes = ((8, 50), (2, 12, 8), (2, 12), (2, 12))
    weight, hidden, targets, weights = (jnp.ones(shape) for shape in shapes)
    targets = targets.astype(jnp.int32)

    def nats(weight, hidden):
        return sum_cross_entropy(with_head(weight), hidden, targets, weights, 8).objective

    text = jax.jit(jax.grad(nats, (0, 1))).lower(weight, hidden).as_text()
    assert text.count("stablehlo.dot_general") == 3
    assert jax.jit(nats).lower(weight, hidden).as_text().count("stablehlo.dot_general") == 1


@pytest.mark.core
@pytest.mark.parametrize(("length", "chunk"), [(12, 1), (12, 7), (12, 24), (12, 10**6), (13, 15)])
def test_chunks_give_the_direct_value_and_gradient(rng, length: int, chunk: int):
    hidden = jnp.asarray(rng.standard_normal((3, length, 8)), jnp.float32)
    weight = jnp.asarray(rng.standard_normal((8, 50)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 50, (3, length)), jnp.int32)
    weights = jnp.asarray(rng.integers(0, 2, (3, length)), jnp.float32)

    def chunked(weight, hidden):
        sums = sum_cross_entropy(with_head(weight), hidden, targets, weights, chunk, 0.3)
        return 2 * sums.objective, (sums.nats, sums.squared_z)

    def whole(weight, hidden):
        nats, z = direct(weight, hidden, targets, weights)
        return 2 * (nats + 0.3 * z), (nats, z)

    found, found_gradient = jax.value_and_grad(chunked, (0, 1), has_aux=True)(weight, hidden)
    expected, gradient = jax.value_and_grad(whole, (0, 1), has_aux=True)(weight, hidden)
    np.testing.assert_allclose(found[1], expected[1], rtol=2e-6)
    for a, b in zip(found_gradient, gradient, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2, "expert": 2}, {"fsdp": 4, "tensor": 2}])
def test_the_head_is_gathered_once_and_its_gradient_scattered_once(rng, sizes):
    mesh = make_mesh(MeshConfig(**sizes), jax.devices()[:8])
    rules = train_rules(mesh)
    hidden = jnp.asarray(rng.standard_normal((8, 32, 16)), jnp.float32)
    weight = jnp.asarray(rng.standard_normal((16, 64)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 64, (8, 32)), jnp.int32)
    weights = jnp.asarray(rng.integers(0, 2, (8, 32)), jnp.float32)
    arrays = [
        jax.device_put(array, rules.sharding(*dims))
        for array, dims in (
            (weight, ("param_embed", "vocab")),
            (hidden, ("batch", "length", "embed")),
            (targets, ("batch", "length")),
            (weights, ("batch", "length")),
        )
    ]
    rows = 8 // rules.num_batch_shards()

    def loss(weight, hidden, targets, weights, rules=rules):
        model = with_head(weight)
        model.options.rules = rules
        return sum_cross_entropy(model, hidden, targets, weights, 4 * rows, 0.3).objective

    step = jax.jit(
        jax.value_and_grad(loss, (0, 1)),
        out_shardings=(None, (arrays[0].sharding, arrays[1].sharding)),
    )
    compiled = step.lower(*arrays).compile()
    uses = count_collectives(compiled.as_text() or "", dict(mesh.shape))
    head_bytes = 16 * 64 * 4 // sizes.get("tensor", 1)
    for axis in ("fsdp", "expert"):
        if sizes.get(axis, 1) > 1:  # eight chunks; forward and, no more backward
            assert uses[f"all-gather over {axis}"].executions == 1
            assert uses[f"reduce-scatter over {axis}"].executions == 1
    summed = sum(use.bytes for name, use in uses.items() if name.startswith("all-reduce"))
    assert summed < 2 * head_bytes or sizes.get("tensor", 1) > 1  # none of the whole head a chunk
    value, gradients = compiled(*arrays)
    expected = jax.value_and_grad(functools.partial(loss, rules=ShardingRules()), (0, 1))(
        weight, hidden, targets, weights
    )
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    for found, each in zip(gradients, expected[1], strict=True):
        np.testing.assert_allclose(found, each, rtol=1e-4, atol=1e-5)


def test_a_prime_length_takes_no_more_chunks_than_another():
    def chunks(length: int) -> list[tuple[int, ...]]:
        found: list[tuple[int, ...]] = []

        def logits(hidden_BtD, weight_DW):
            found.append(hidden_BtD.shape)
            return float32_matmul(hidden_BtD, weight_DW)

        model = with_head(jnp.ones((4, 7)))
        model.lm_head.logits = logits
        tokens, hidden = jnp.ones((2, length), jnp.int32), jnp.ones((2, length, 4))
        sum_cross_entropy(model, hidden, tokens, jnp.ones((2, length)), 64)
        return found

    assert chunks(96) == chunks(89) == [(2, 32, 4)] or chunks(89) == [(2, 30, 4)]


def test_bfloat16_multiplies_in_bfloat16_and_adds_up_in_float32(rng):
    hidden = jnp.asarray(rng.standard_normal((2, 64, 32)), jnp.bfloat16)
    weight = jnp.asarray(rng.standard_normal((32, 300)) / 6, jnp.bfloat16)
    targets = jnp.asarray(rng.integers(0, 300, (2, 64)), jnp.int32)
    weights = jnp.ones((2, 64))

    def nats(weight, hidden):
        return sum_cross_entropy(with_head(weight), hidden, targets, weights, 16)[0]

    def whole(weight, hidden):
        return direct(weight, hidden, targets, weights)[0]

    gradient = jax.grad(nats, (0, 1))
    text = jax.jit(gradient).lower(weight, hidden).as_text()
    dots = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(dots) >= 3
    for line in dots:  # both operands, whatever the result is
        assert line.split(" : (")[1].split(")")[0].count("bf16") == 2, line
    wide = [x.astype(jnp.float32) for x in (weight, hidden)]
    for found, expected in zip(
        gradient(weight, hidden), jax.grad(whole, (0, 1))(*wide), strict=True
    ):
        assert found.dtype == jnp.bfloat16
        error = jnp.linalg.norm(found.astype(jnp.float32) - expected) / jnp.linalg.norm(expected)
        assert error < 5e-3


def test_memory_is_bounded_by_a_chunk(rng):
    batch, length, dim, vocab, chunk = 4, 512, 8, 20_000, 64
    targets = jnp.zeros((batch, length), jnp.int32)
    weights = jnp.ones((batch, length))

    def temporary_bytes(loss) -> int:
        shapes = (
            jax.ShapeDtypeStruct((dim, vocab), jnp.float32),
            jax.ShapeDtypeStruct((batch, length, dim), jnp.float32),
        )
        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    chunked = temporary_bytes(
        lambda w, h: sum_cross_entropy(with_head(w), h, targets, weights, chunk)[0]
    )
    whole = temporary_bytes(lambda w, h: direct(w, h, targets, weights)[0])
    all_logits, chunk_logits = 4 * batch * length * vocab, 4 * chunk * vocab
    assert whole > all_logits
    assert chunked < 6 * chunk_logits < all_logits / 4


def test_balance_terms_weigh_the_sums_over_layers():
    stats = RouterStats(
        expert=jnp.array([1.0, 2.0]),
        device=jnp.array([3.0, 4.0]),
        communication=jnp.array([5.0, 6.0]),
        load_E=jnp.zeros((2, 8)),
        dropped=jnp.zeros(2),
        entropy=jnp.zeros(2),
    )
    terms = balance_terms(stats, BalanceConfig(0.003, 0.05, 0.02), SMALL.moe)
    np.testing.assert_allclose(terms, [0.009, 0.35, 0.22], rtol=1e-6)
    assert [float(term) for term in balance_terms(None, BalanceConfig(1, 1, 1), None)] == [0, 0, 0]


def test_training_loss_adds_its_terms_up(rng):
    model = random_model(replace(SMALL, num_layers=2))
    tokens = jnp.asarray(rng.integers(0, 48, (2, 8)), jnp.int32)
    batch = {
        "tokens": tokens,
        "targets": jnp.roll(tokens, -1, axis=1),
        "positions": jnp.broadcast_to(jnp.arange(8), (2, 8)),
        "segment_ids": jnp.ones((2, 8), jnp.int32),
        "weights": jnp.ones((2, 8)).at[:, -1].set(0),
    }
    config = LossConfig(
        balance=BalanceConfig(0.1, 0.2, 0.3), z_loss=0.01, chunk=4, router_entropy=True
    )
    total_weight = jnp.sum(batch["weights"])
    total, terms = training_loss(model, batch, config, total_weight, 1.0)
    hidden, stats = model.hidden(tokens, batch["positions"], batch["segment_ids"])
    nats, z = direct(model.lm_head.stored(), hidden, batch["targets"], batch["weights"])
    assert stats is not None
    expected = [
        nats / 14,
        0.01 * z / 14,
        0.1 * jnp.sum(stats.expert),
        0.2 * jnp.sum(stats.device),
        0.3 * jnp.sum(stats.communication),
    ]
    found = [
        terms.cross_entropy,
        terms.z,
        terms.balance_expert,
        terms.balance_device,
        terms.balance_communication,
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert min(found) > 0
    np.testing.assert_allclose(total, sum(expected), rtol=1e-5)
    np.testing.assert_array_equal(terms.load_LE.sum(-1), [2 * 8 * SMALL_MOE.top_k])
    assert terms.entropy_L is not None
    np.testing.assert_allclose(terms.entropy_L, stats.entropy)
    assert 0 < float(stats.entropy[0]) <= np.log(SMALL_MOE.num_experts) + 1e-6
