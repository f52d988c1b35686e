"""Training with rows that devices divide: the losses and gradients of one device."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsjax.config import BalanceConfig, LossConfig, MeshConfig, TokenDropping
from dsjax.kernels import Kernels
from dsjax.mesh import ShardingRules, make_mesh, train_rules
from dsjax.processes import HostShard
from dsjax.training.step import accumulate_gradients, eval_step
from tests.small_models import RUNTIME, SMALL, random_model

ROWS, LENGTH = 4, 64
LOSS = LossConfig(
    balance=BalanceConfig(0.1, 0.2, 0.3),
    z_loss=0.01,
    chunk=24,
    router_entropy=True,
    # Budgets that one device and two groups of devices agree on.
    dropping=TokenDropping(capacity_factor=0.6, undropped_fraction=0.3, budget_rows=2),
)
gradients_of = jax.jit(accumulate_gradients, static_argnums=(0, 1))
run_model = jax.jit(
    lambda graphdef, params, tokens, ids: nnx.merge(graphdef, params)(tokens, None, ids),
    static_argnums=0,
)


def draw_rows(seed: int) -> dict[str, np.ndarray]:
    """Rows of documents of any lengths, the last of them padding, as a loader gives them."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, SMALL.vocab_size, (ROWS, LENGTH)).astype(np.int32)
    positions, ids = np.zeros_like(tokens), np.zeros_like(tokens)
    weights = np.zeros(tokens.shape, np.float32)
    for row in range(ROWS):
        filled = LENGTH - rng.integers(0, 9)
        cuts = np.sort(rng.choice(filled - 1, rng.integers(0, 6), replace=False)) + 1
        bounds = [0, *cuts, filled]
        for number, (first, end) in enumerate(itertools.pairwise(bounds), 1):
            positions[row, first:end] = np.arange(end - first)
            ids[row, first:end] = number
            weights[row, first : end - 1] = 1
    return {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "positions": positions,
        "segment_ids": ids,
        "weights": weights,
    }


def model_on(mesh: MeshConfig | None, remat="none", transport: str = "gather"):
    """The same small model on any mesh."""
    rules = ShardingRules()
    if mesh is not None:
        sizes = (mesh.data, mesh.fsdp, mesh.expert, mesh.context, mesh.tensor)
        rules = train_rules(make_mesh(mesh, jax.devices()[: int(np.prod(sizes))]))
    runtime = replace(RUNTIME, remat=remat)
    model = random_model(SMALL, 0, runtime, rules, Kernels(latent_exchange=transport))
    return nnx.split(model), HostShard(rules)


def compare(got, want) -> None:
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        error = np.abs(np.asarray(a) - np.asarray(b)).max() / (np.abs(np.asarray(b)).max() + 1e-9)
        assert error < 2e-5, jax.tree_util.keystr(path)


def gradients(mesh: MeshConfig | None, seeds: range, **options: str) -> list:
    """Gradients and loss terms of rows drawn with each seed."""
    (graphdef, params), shard = model_on(mesh, **options)
    found = []
    for seed in seeds:
        batch = shard.place(draw_rows(seed), 1)
        batch["exempt"] = jnp.asarray([[True, False, False, False]])
        found.append(gradients_of(graphdef, LOSS, params, batch))
    return found


@pytest.mark.slow
def test_devices_that_divide_rows_train_as_one_does():
    """Losses, routers' figures and gradients, of packed documents that end anywhere."""
    alone = gradients(None, range(3))
    assert all(0.05 < float(terms.dropped) < 0.5 for _, terms in alone)
    for mesh, remat, transport in (
        (MeshConfig(data=2, fsdp=1, context=4), "none", "gather"),
        (MeshConfig(fsdp=1, expert=2, context=2, tensor=2), "save_attention", "ring"),
    ):
        for got, want in zip(
            gradients(mesh, range(3), remat=remat, transport=transport), alone, strict=True
        ):
            compare(got, want)


def test_evaluation_and_logits_are_one_devices():
    rows = draw_rows(5)
    found = []
    for mesh in (None, MeshConfig(fsdp=2, context=4)):
        (graphdef, params), shard = model_on(mesh)
        batch = shard.place(rows | {"num_bytes": np.full(ROWS, 7)}, 1)
        sums = eval_step(graphdef, 24, params, jax.tree.map(lambda x: x[0], batch))
        # Whoever calls the model gives tokens, and gets logits, in the order of the text.
        logits = run_model(graphdef, params, rows["tokens"], rows["segment_ids"])
        found.append((np.asarray(sums), np.asarray(logits)))
    for got, want in zip(*found, strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)
