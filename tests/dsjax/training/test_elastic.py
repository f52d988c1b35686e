"""A run on eight devices, then on four, then on eight again."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from dsjax.config import CheckpointConfig, MeshConfig, OptimizerConfig, SourceConfig
from dsjax.data.loader import Loader
from dsjax.data.offline import pack
from dsjax.training.loop import fit
from tests.dsjax.training.small_runs import LENGTH, losses, small_run


@pytest.fixture
def taken(monkeypatch) -> list[np.ndarray]:
    """The tokens of each step, as its loader gave them."""
    found: list[np.ndarray] = []
    next_batch = Loader.next_batch

    def listened(self: Loader, num_rows: int) -> dict[str, np.ndarray]:
        batch = next_batch(self, num_rows)
        found.append(batch["tokens"].copy())
        return batch

    monkeypatch.setattr(Loader, "next_batch", listened)
    return found


@pytest.mark.slow
def test_fewer_devices_and_more_again_read_the_same_and_lose_the_same(
    corpus: Path, tmp_path: Path, taken
):
    """The rest of a pod goes on where a part of it is lost, and all of it once that is back."""
    documents = [SourceConfig(str(corpus), format="jsonl")]
    pack(documents, tmp_path / "rows", tokenizer="bytes", length=LENGTH)
    steady = small_run(
        tmp_path / "steady",
        corpus,
        mesh=MeshConfig(expert=2),  # and fsdp of what is left: 4, then 2
        optimizer=OptimizerConfig(peak_learning_rate=3e-3, warmup_steps=2, decay_at=()),
        checkpoint=CheckpointConfig(every=100),
    )
    rows = (SourceConfig(str(tmp_path / "rows")),)
    steady = replace(steady, data=replace(steady.data, sources=rows, eval_sources=()))
    fit(steady, devices=jax.devices()[:8])
    expected = list(taken)
    taken.clear()
    moved = replace(steady, directory=str(tmp_path / "moved"))
    for num_devices, until in ((8, 2), (4, 4), (8, 6)):
        ended = fit(replace(moved, num_steps=until), devices=jax.devices()[:num_devices])
        assert len(jax.tree.leaves(nnx.state(ended.model))[0].devices()) == num_devices
    assert len(expected) == 6
    np.testing.assert_array_equal(np.stack(taken), np.stack(expected))
    alone, together = losses(tmp_path / "steady"), losses(tmp_path / "moved")
    assert list(together) == list(alone) == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(list(together.values()), list(alone.values()), rtol=2e-5)
