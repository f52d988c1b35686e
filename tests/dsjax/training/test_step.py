"""One optimiser step: what it changes, what it must not, and when it changes nothing."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsjax.config import (
    BalanceConfig,
    BatchConfig,
    GuardConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    RuntimeConfig,
    TokenDropping,
)
from dsjax.configs.models import tiny
from dsjax.data.loader import make_loader
from dsjax.mesh import ShardingRules
from dsjax.model import create_model
from dsjax.training.dropping import draw_exempt, with_budget
from dsjax.training.report import step_figures
from dsjax.training.step import (
    SKIP_REASONS,
    Guard,
    TrainState,
    accumulate_gradients,
    init_train_state,
    jitted_train_step,
)
from dsjax.xla_options import compiler_options
from tests.dsjax.training.small_runs import MODEL, small_run
from tests.small_models import LOSS, RUNTIME

take_step = jitted_train_step(jax.devices()[0].platform)
OPTIMIZER = OptimizerConfig(peak_learning_rate=3e-3, warmup_steps=2)


def begin(
    config: ModelConfig = MODEL,
    runtime: RuntimeConfig = RUNTIME,
    optimizer: OptimizerConfig = OPTIMIZER,
):
    graphdef, params = nnx.split(create_model(config, 0, runtime))
    return graphdef, init_train_state(optimizer, params)


def step(graphdef, state: TrainState, batch, rate: float, loss=LOSS, guard=GuardConfig()):  # noqa: B008
    """Takes a step and leaves the state that it is given usable."""
    state = jax.tree.map(jnp.copy, state)
    return take_step(graphdef, OPTIMIZER, loss, guard, state, batch, jnp.float32(rate))


@pytest.fixture(scope="module")
def batches(corpus, tmp_path_factory):
    """Eight batches of the corpus, [1, 8, 32]."""
    loader = make_loader(small_run(tmp_path_factory.mktemp("run"), corpus).data)
    made = []
    for _ in range(8):
        rows = loader.next_batch(8)
        rows.pop("num_bytes")
        made.append({name: jnp.asarray(values[None]) for name, values in rows.items()})
    loader.close()
    return made


def leaves(tree) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def assert_same(a, b) -> None:
    for x, y in zip(leaves(a), leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_slices_give_the_gradient_of_the_whole(batches):
    graphdef, state = begin()
    loss = LossConfig(balance=BalanceConfig(0.1, 0.1, 0.1), z_loss=0.01)
    sliced = jax.tree.map(lambda x: x.reshape(4, 2, 32), batches[0])
    run = jax.jit(accumulate_gradients, static_argnums=(0, 1))
    (whole, terms), (parts, part_terms) = (
        run(graphdef, loss, state.params, batch) for batch in (batches[0], sliced)
    )
    for a, b in zip(leaves(whole), leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * np.abs(a).max() + 1e-9)
    for a, b in zip(leaves(terms), leaves(part_terms), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_the_routers_entropy_is_measured_where_it_is_asked_for(batches):
    """Elsewhere the program does not have the logarithms that it takes."""
    graphdef, state = begin()
    run = jax.jit(accumulate_gradients, static_argnums=(0, 1))
    sliced = jax.tree.map(lambda x: x.reshape(4, 2, 32), batches[0])
    logs = []
    for loss in (LOSS, replace(LOSS, router_entropy=True)):
        lowered = run.lower(graphdef, loss, state.params, sliced)
        logs.append(lowered.as_text().count("stablehlo.log "))
    assert logs[0] < logs[1]
    assert lowered.out_info[1].entropy_L.shape == (MODEL.num_moe_layers,)


@pytest.mark.core
def test_a_step_is_adamw_with_clipped_gradients(batches):
    graphdef, state = begin()
    after, report = step(graphdef, state, batches[0], 1e-2)
    run = jax.jit(accumulate_gradients, static_argnums=(0, 1))
    gradients, _ = run(graphdef, LOSS, state.params, batches[0])
    norm = float(np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in leaves(gradients))))
    assert norm > 1  # so that clipping acts
    np.testing.assert_allclose(report.gradient_norm, norm, rtol=1e-5)
    # On Adam's first step the bias-corrected moments are the gradient and its square.
    flat = [dict(nnx.to_flat_state(tree)) for tree in (state.params, gradients, after.params)]
    for path, before in flat[0].items():
        gradient = np.asarray(flat[1][path][...], np.float64) / norm
        decay = 0.0 if before.get_metadata("dims") == ("norm",) else 0.1
        update = gradient / (np.abs(gradient) + 1e-8) + decay * np.asarray(before[...])
        expected = np.asarray(before[...], np.float64) - 1e-2 * update
        large = np.abs(gradient) > 1e-6  # elsewhere the sign hangs on rounding
        np.testing.assert_allclose(
            np.asarray(flat[2][path][...])[large], expected[large], rtol=1e-3, atol=2e-5
        )
    assert int(after.step) == 1


def test_bfloat16_parameters_keep_float32_moments(batches):
    graphdef, state = begin(
        MODEL, RuntimeConfig(dtype="bfloat16", param_dtype="bfloat16", remat="none")
    )
    assert {leaf.dtype for leaf in leaves(state.params)} == {jnp.dtype("bfloat16")}
    after, report = step(graphdef, state, batches[0], 1e-2)
    assert {leaf.dtype for leaf in leaves(after.params)} == {jnp.dtype("bfloat16")}
    for name in ("mu", "nu"):
        moments = getattr(after.moments, name)
        assert {leaf.dtype for leaf in leaves(moments)} == {jnp.dtype("float32")}
        assert all(np.any(leaf != 0) for leaf in leaves(moments))
    # The same weights in float32 have nearly the same loss: one field apart.
    graphdef, wide = begin()
    _, wide_report = step(graphdef, wide, batches[0], 1e-2)
    np.testing.assert_allclose(report.loss.total, wide_report.loss.total, rtol=0.02)


BAD = [
    ("the loss is not finite", {"weight": np.nan}, {}),
    ("the loss is not finite", {"weight": np.inf}, {}),
    ("the gradient norm is not finite", {"norm_overflow": True}, {}),
    ("the loss spiked", {}, {"mean_loss": 0.5, "mean_norm": 1.0, "applied": 200}),
    ("the gradient norm spiked", {}, {"mean_loss": 5.0, "mean_norm": 0.01, "applied": 200}),
]


@pytest.mark.core
@pytest.mark.parametrize(("reason", "damage", "remembered"), BAD)
def test_a_bad_step_changes_nothing(batches, reason: str, damage: dict, remembered: dict):
    graphdef, state = begin()
    batch = batches[0]
    if "weight" in damage:
        weights = batch["weights"].at[0, 0, 0].set(damage["weight"])
        batch = batch | {"weights": weights}
    if damage.get("norm_overflow"):
        # A tiny last norm and huge head: the loss is finite, the head's gradient squared is not.
        norm = state.params["norm"]["weight"]
        norm[...] = norm[...] * 1e-30
        embed = state.params["lm_head"]["weight"]
        embed[...] = embed[...] * 1e30
    if remembered:
        values = {"mean_loss": 0.0, "mean_norm": 0.0, "applied": 0} | remembered
        guard = Guard(
            jnp.float32(values["mean_loss"]),
            jnp.float32(values["mean_norm"]),
            jnp.int32(values["applied"]),
            jnp.int32(3),
        )
        state = replace(state, guard=guard)
    after, report = step(graphdef, state, batch, 1e-2)
    assert SKIP_REASONS[int(report.skip_reason)] == reason
    assert_same(after.params, state.params)
    assert_same(after.moments, state.moments)
    assert int(after.step) == 1
    assert int(after.guard.applied) == int(state.guard.applied)
    assert int(report.skipped_in_a_row) == int(state.guard.skipped_in_a_row) + 1
    # The next good step is applied and ends the row.
    good = replace(after, guard=replace(after.guard, applied=jnp.int32(0)))
    if not damage.get("norm_overflow"):
        last, report = step(graphdef, good, batches[0], 1e-2)
        assert SKIP_REASONS[int(report.skip_reason)] == ""
        assert int(report.skipped_in_a_row) == 0
        assert any(np.any(a != b) for a, b in zip(*map(leaves, (last, after)), strict=True))


def test_running_means_follow_the_applied_steps(batches):
    graphdef, state = begin()
    found = []
    for batch in batches[:3]:
        state, report = step(graphdef, state, batch, 1e-3)
        found.append((float(report.loss.total), float(report.gradient_norm)))
    assert int(state.guard.applied) == 3
    means = float(state.guard.mean_loss), float(state.guard.mean_norm)
    np.testing.assert_allclose(means, np.mean(found, axis=0), rtol=1e-5)


def test_slices_drop_what_the_whole_batch_drops(batches):
    """Budgets and exempt sequences are those of the same rows, however the batch is cut up."""
    dropping = TokenDropping(capacity_factor=0.6, undropped_fraction=0.3, budget_rows=2)
    loss = replace(LOSS, dropping=dropping)
    graphdef, state = begin()
    whole = batches[0]
    found = []
    for slices in (1, 2, 4):
        batch = jax.tree.map(lambda x, n=slices: x.reshape(n, -1, *x.shape[2:]), whole)
        found.append(step(graphdef, state, batch, 1e-3, loss)[1])
    for other in found[1:]:
        # The share is a mean over slices, which have more and less padding.
        np.testing.assert_allclose(other.loss.dropped, found[0].loss.dropped, rtol=5e-2)
        np.testing.assert_allclose(other.gradient_norm, found[0].gradient_norm, rtol=1e-4)
    assert 0.05 < float(found[0].loss.dropped) < 0.4


def test_exempt_sequences_are_a_fair_draw():
    dropping = TokenDropping(undropped_fraction=0.1)
    draws = [draw_exempt(dropping, jnp.int32(step), (4, 5)) for step in range(60)]
    share = np.mean(np.asarray(draws))
    assert 0.07 < share < 0.13  # slices of five would round to none
    # The same places are drawn in another cut of the batch, and others with another seed.
    again = draw_exempt(dropping, jnp.int32(3), (1, 20))
    np.testing.assert_array_equal(again.reshape(4, 5), draws[3])
    other = [draw_exempt(replace(dropping, seed=1), jnp.int32(s), (4, 5)) for s in range(60)]
    assert not np.array_equal(other, draws)


def test_a_run_keeps_its_budget(tmp_path):
    config = small_run(tmp_path, tmp_path, loss=replace(LOSS, dropping=TokenDropping()))

    def with_rows(config, rows):
        return replace(config, loss=replace(LOSS, dropping=TokenDropping(budget_rows=rows)))

    started = with_budget(config, ShardingRules(), None)
    assert started == with_rows(config, 8)
    cut = replace(config, batch=BatchConfig(size=8, accumulate=4))
    assert with_budget(cut, ShardingRules(), None) == with_rows(cut, 2)
    with pytest.raises(ValueError, match="budget_rows=8: must divide the 2 sequences of a slice"):
        with_budget(cut, ShardingRules(), started)
    assert with_budget(config, ShardingRules(), with_rows(cut, 2)) == with_rows(config, 2)


def test_a_users_flags_go_before_ours(monkeypatch):
    for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"):
        monkeypatch.setenv(name, "")
    (option,) = compiler_options("tpu")
    assert compiler_options("cpu") == {}
    monkeypatch.setenv("LIBTPU_INIT_ARGS", f"--other=1 --{option}=false")
    assert compiler_options("tpu") == {}


@pytest.mark.slow
def test_the_tiny_model_overfits_one_batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 256, (4, 32))
    tokens[:, 0] = np.arange(4)  # each sequence's first token tells it from the others
    weights = np.ones((4, 32), np.float32)
    weights[:, -1] = 0
    rows = {
        "tokens": tokens.astype(np.int32),
        "targets": np.roll(tokens, -1, axis=1).astype(np.int32),
        "positions": np.tile(np.arange(32, dtype=np.int32), (4, 1)),
        "segment_ids": np.ones((4, 32), np.int32),
        "weights": weights,
    }
    batch = {name: jnp.asarray(values[None]) for name, values in rows.items()}
    graphdef, state = begin(tiny.config)
    for count in range(150):
        rate = 3e-3 * min(1.0, (count + 1) / 10)
        state, report = take_step(
            graphdef, OPTIMIZER, LOSS, GuardConfig(), state, batch, jnp.float32(rate)
        )
        if count == 0:
            assert float(report.loss.cross_entropy) > 5
    assert float(report.loss.cross_entropy) < 0.05


@pytest.mark.slow
def test_balance_losses_lower_the_load_imbalance(batches):
    imbalance = {}
    for name, balance in (
        ("without", BalanceConfig(0, 0, 0)),
        ("with", BalanceConfig(expert=0.1, device=0.1, communication=0.05)),
    ):
        graphdef, state = begin()
        # A router that prefers few experts from the start.
        router = state.params["moe_layers"]["feed_forward"]["router"]["gate"]["weight"]
        router[...] = router[...] * 8
        found = []
        for count in range(60):
            batch = batches[count % len(batches)]
            loss = LossConfig(balance=balance)
            state, report = take_step(
                graphdef, OPTIMIZER, loss, GuardConfig(), state, batch, jnp.float32(3e-3)
            )
            found.append(step_figures(report)["load_imbalance"])
        imbalance[name] = np.mean(found[-8:])
    assert imbalance["without"] > 1.8
    assert imbalance["with"] < 1.5
    assert imbalance["with"] < 0.75 * imbalance["without"]
