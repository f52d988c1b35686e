"""A run that is built, compiled and not begun."""

from dataclasses import replace
from pathlib import Path

import jax
import pytest

from dsjax.config import BatchConfig, PrepareConfig, SourceConfig, TrainConfig
from dsjax.training.dry_run import dry_run
from tests.dsjax.training.small_runs import LENGTH, MODEL, small_run


def everything_in(folder: Path) -> dict[str, float]:
    return {str(path): path.stat().st_mtime for path in folder.rglob("*")}


def test_it_says_sizes_and_leaves_nothing(corpus: Path, tmp_path: Path):
    batch = BatchConfig(size=16, initial_size=8, ramp_tokens=999, ramp_stages=2, accumulate=2)
    config = small_run(tmp_path / "runs" / "run", corpus, batch=batch)
    figures = dry_run(config)
    assert not (tmp_path / "runs").exists()
    assert figures["devices"] == 8
    assert figures["mesh"]["fsdp"] == 8
    assert figures["batch_sizes"] == [8, 16]
    assert figures["tokens"] == (4 * 8 + 2 * 16) * LENGTH
    assert figures["resumes_at"] == 0
    assert "a batch was read" in figures["data"]
    # Two float32 moments; what is divided over eight devices is an eighth, norms are whole.
    assert figures["optimizer_bytes"] == 2 * figures["parameter_bytes"] + 4
    assert figures["parameters"] * 4 / 8 < figures["parameter_bytes"] < figures["parameters"] * 4
    assert figures["checkpoint_bytes"] > 3 * 4 * figures["parameters"]
    assert figures["peak_bytes"] > figures["parameter_bytes"] + figures["optimizer_bytes"]


def test_it_says_where_a_run_would_go_on_and_touches_nothing(trained_run: TrainConfig):
    folder = Path(trained_run.directory)
    before = everything_in(folder)
    one = jax.devices()[:1]
    assert dry_run(trained_run, one)["resumes_at"] == 6
    assert dry_run(trained_run, one, step=4)["resumes_at"] == 4
    with pytest.raises(ValueError, match=r"step=5: .* has no such step; it has 2, 4, 6"):
        dry_run(trained_run, one, step=5)
    with pytest.raises(ValueError, match=r"another config: model.hidden_dim=32, not 64$"):
        dry_run(replace(trained_run, model=replace(MODEL, hidden_dim=64)), one)
    assert everything_in(folder) == before


def test_data_that_are_not_made_yet_are_said(corpus: Path, tmp_path: Path):
    config = small_run(tmp_path / "run", corpus)
    packed = (SourceConfig(str(tmp_path / "packed")),)
    prepare = PrepareConfig("python_library", str(tmp_path / "corpus"), vocab_size=264)
    data = replace(
        config.data, sources=packed, eval_sources=packed, tokenizer="tokens", prepare=prepare
    )
    figures = dry_run(replace(config, data=data), jax.devices()[:1])
    assert figures["data"].startswith("not there yet; the run will make them in ")
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_is_named(corpus: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"batch.size=12: its slices of 12 .* the 8 batch shards"):
        dry_run(small_run(tmp_path / "run", corpus, batch=BatchConfig(size=12)))
