"""The training loop in one process: figures, evaluation, resuming, and what it refuses."""

import json
import math
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsjax.config import BatchConfig, CheckpointConfig, GuardConfig, LogConfig, TrainConfig
from dsjax.data.loader import make_eval_batches
from dsjax.data.offline import pack
from dsjax.training import report, start
from dsjax.training.loop import TrainingStopped, fit
from tests.dsjax.training.small_runs import (
    LENGTH,
    MODEL,
    SourceConfig,
    losses,
    read_metrics,
    small_run,
)


def run(config: TrainConfig):
    return fit(config, devices=jax.devices()[:1])


def params_of(result) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(result.model))]


STEP_KEYS = {
    "step",
    "loss",
    "cross_entropy",
    "z_loss",
    "balance_expert",
    "balance_device",
    "balance_communication",
    "gradient_norm",
    "dropped_share",
    "skipped",
    "load_imbalance",
    "load_imbalance_mean",
    "device_load",
    "device_load_imbalance",
    "device_load_imbalance_mean",
    "expert_load",
    "learning_rate",
    "batch_size",
    "input_seconds",
    "tokens",
}
TIME_KEYS = {"step_seconds", "tokens_per_second"}
SAVE_KEYS = {"save_stall_seconds", "save_seconds"}


@pytest.mark.core
def test_every_step_has_its_figures(trained_run: TrainConfig):
    lines = read_metrics(Path(trained_run.directory))
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert set(steps[0]) == STEP_KEYS  # compiling is no step's time
    for line in steps[1:]:
        # An evaluation between two steps counts for neither, but both are still measured.
        assert set(line) - TIME_KEYS - SAVE_KEYS == STEP_KEYS
    assert all(set(line) >= TIME_KEYS for line in steps if line["step"] in (2, 4, 6))
    for line in steps:
        assert line["tokens"] == line["step"] * 8 * LENGTH
        assert line["batch_size"] == 8
        assert line["loss"] == line["cross_entropy"]
        assert line["skipped"] == ""
        (load,) = line["expert_load"]
        assert len(load) == 8
        assert sum(load) == pytest.approx(1, abs=1e-3)
        assert line["load_imbalance"] == pytest.approx(max(load) * 8, abs=1e-3)
        if "step_seconds" in line:
            speed = 8 * LENGTH / line["step_seconds"]
            assert line["tokens_per_second"] == pytest.approx(speed, rel=1e-6)
    assert steps[0]["cross_entropy"] == pytest.approx(math.log(264), rel=0.05)
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5
    assert [line["learning_rate"] for line in steps] == pytest.approx(
        [1.5e-3, 3e-3, 3e-3, 3e-3, 3e-3 * 0.316, 3e-3 * 0.316]
    )


@pytest.mark.core
def test_evaluation_is_the_direct_bits_per_byte(trained_run: TrainConfig):
    lines = [line for line in read_metrics(Path(trained_run.directory)) if "loss" not in line]
    assert [line["step"] for line in lines] == [2, 4, 6]
    result = run(trained_run)  # is finished: evaluates, trains nothing
    assert (result.step, result.finished) == (6, True)
    nats, num_tokens, num_bytes = 0.0, 0, 0
    for batch in make_eval_batches(trained_run.data, 8):
        logits = result.model(
            jnp.asarray(batch["tokens"]),
            jnp.asarray(batch["positions"]),
            jnp.asarray(batch["segment_ids"]),
        )
        log_p = jax.nn.log_softmax(logits, axis=-1)
        chosen = np.take_along_axis(np.asarray(log_p), batch["targets"][..., None], -1)[..., 0]
        nats -= float((chosen * batch["weights"]).sum())
        num_tokens += int(batch["weights"].sum())
        num_bytes += int(batch["num_bytes"].sum())
    texts = (Path(trained_run.data.sources[0].path) / "sums.jsonl").read_text().splitlines()
    assert num_bytes == sum(len(json.loads(text)["text"].encode()) for text in texts)
    expected = nats / math.log(2) / num_bytes
    assert result.bits_per_byte == pytest.approx(expected, rel=1e-5)
    assert lines[-1]["eval_bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    assert lines[-1]["eval_cross_entropy"] == pytest.approx(nats / num_tokens, rel=1e-5)


def test_tensorboard_has_the_figures(trained_run: TrainConfig):
    from tensorboardX.event_file_writer import EventFileWriter  # noqa: F401
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    found: dict[tuple[str, int], float] = {}
    for path in (Path(trained_run.directory) / "tensorboard").iterdir():
        data = path.read_bytes()
        while data:  # TFRecord: length, its checksum, the record, its checksum
            size = int.from_bytes(data[:8], "little")
            assert int.from_bytes(data[8:12], "little") == masked_crc32c(data[:8])
            event = Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            for value in event.summary.value:
                found[value.tag, event.step] = value.simple_value
    for line in read_metrics(Path(trained_run.directory)):
        for name in ("loss", "gradient_norm", "eval_bits_per_byte"):
            if name in line and line["step"] <= 4:
                assert found[name, line["step"]] == pytest.approx(line[name], rel=1e-6)


@pytest.fixture(scope="module")
def packed_sources(corpus: Path, tmp_path_factory) -> tuple[SourceConfig, ...]:
    folder = tmp_path_factory.mktemp("packed")
    source = SourceConfig(str(corpus), format="jsonl")
    pack([source], folder, tokenizer="bytes", length=LENGTH, num_shards=2)
    return (SourceConfig(str(folder)),)


@pytest.mark.parametrize("kind", ["documents", "packed"])
def test_stopping_and_going_on_changes_no_bit(kind: str, corpus, packed_sources, tmp_path: Path):
    config = small_run(tmp_path / "whole", corpus, log=LogConfig(every=1, eval_every=0))
    if kind == "packed":
        config = replace(config, data=replace(config.data, sources=packed_sources))
    # The schedule depends on the run's length, so the first part is stopped and not shortened.
    whole = run(replace(config, checkpoint=CheckpointConfig(every=3, keep_latest=9)))
    parts = tmp_path / "parts"
    (parts / "checkpoints").mkdir(parents=True)
    for name in ("run.json", "metrics.jsonl", "checkpoints/3"):
        (tmp_path / "whole" / name).rename(parts / name)
    expected = losses_of(parts / "metrics.jsonl")
    again = run(replace(config, directory=str(parts)))
    assert losses(parts) == expected
    for a, b in zip(params_of(whole), params_of(again), strict=True):
        np.testing.assert_array_equal(a, b)
    assert whole.bits_per_byte == again.bits_per_byte
    # Evaluated at the end alone, and lines of steps that were taken again are there once.
    evaluations = [line["step"] for line in read_metrics(parts) if "loss" not in line]
    assert evaluations == [6]


def losses_of(path: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_a_batch_ramp_trains_and_keeps_the_data_in_order(corpus, tmp_path: Path):
    batch = BatchConfig(size=8, initial_size=4, ramp_tokens=8 * LENGTH, ramp_stages=2, accumulate=2)
    config = small_run(tmp_path / "run", corpus, batch=batch, num_steps=4)
    result = run(config)
    steps = [line for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert [line["batch_size"] for line in steps] == [4, 4, 8, 8]
    assert [line["tokens"] // LENGTH for line in steps] == [4, 8, 16, 24]
    # Neither size's compilation is counted as a step's time.
    assert [line["step"] for line in steps if "step_seconds" in line] == [2, 4]
    assert result.finished


def test_mfu_is_given_where_the_peak_is_known(monkeypatch, corpus, tmp_path: Path):
    from dsjax.counts import train_flops_per_token

    monkeypatch.setattr(report, "peak_flops", lambda device: 2e9)
    config = small_run(tmp_path / "run", corpus)
    run(replace(config, num_steps=3))
    flops = train_flops_per_token(MODEL, LENGTH)
    timed = [line for line in read_metrics(tmp_path / "run") if "step_seconds" in line]
    assert len(timed) == 2
    for line in timed:
        assert line["mfu"] == pytest.approx(line["tokens_per_second"] * flops / 2e9)


@pytest.mark.core
def test_bad_steps_in_a_row_stop_the_run(monkeypatch, corpus, tmp_path: Path):
    from dsjax.processes import HostShard

    place = HostShard.place
    count = 0

    def spoil(self, batch, num_slices):
        nonlocal count
        count += 1
        if count > 2:
            batch["weights"] = np.full_like(batch["weights"], np.nan)
        return place(self, batch, num_slices)

    monkeypatch.setattr(HostShard, "place", spoil)
    config = small_run(tmp_path / "run", corpus, checkpoint=CheckpointConfig(every=2))
    config = replace(config, guard=GuardConfig(max_skipped=3), num_steps=20)
    with pytest.raises(
        TrainingStopped,
        match=r"3 steps in a row were skipped up to step 5: the loss is not finite; "
        r"the last checkpoint is of step (4|6)$",
    ):
        run(config)
    lines = read_metrics(tmp_path / "run")
    assert [line["skipped"] for line in lines] == ["", ""] + ["the loss is not finite"] * 3
    assert [line["loss"] is None for line in lines] == [False, False, True, True, True]


@pytest.mark.core
def test_another_model_is_refused_and_nothing_is_lost(trained_run: TrainConfig):
    before = (Path(trained_run.directory) / "run.json").read_bytes()
    assert MODEL.moe is not None
    other = replace(MODEL, hidden_dim=64, moe=replace(MODEL.moe, top_k=1))
    with pytest.raises(
        ValueError, match=r"another config: model.hidden_dim=32, not 64; model.moe.top_k=2, not 1$"
    ):
        run(replace(trained_run, model=other))
    assert (Path(trained_run.directory) / "run.json").read_bytes() == before
    assert (Path(trained_run.directory) / "checkpoints" / "6").is_dir()


REFUSED = [
    ({"batch": BatchConfig(size=12)}, r"batch.size=12: its slices of 12 .* the 8 batch shards"),
    ({"model": replace(MODEL, vocab_size=257)}, r"model.vocab_size=257: must be at least the 258"),
    ({"num_steps": 6, "init_from": "nowhere/at/all"}, "nowhere/at/all"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_does_not_fit_is_named(changes: dict, message: str, corpus, tmp_path: Path):
    with pytest.raises((ValueError, OSError), match=message):
        fit(small_run(tmp_path / "run", corpus, **changes))


def test_weights_of_another_run_are_a_start(trained_run: TrainConfig, corpus, tmp_path: Path):
    config = small_run(tmp_path / "run", corpus, init_from=trained_run.directory, num_steps=1)
    run(config)
    last = losses(Path(trained_run.directory))
    assert losses(tmp_path / "run")[1] < last[5]


def test_fine_tuning_may_change_what_is_no_architecture(
    trained_run: TrainConfig, corpus: Path, tmp_path: Path, caplog, monkeypatch
):
    attention = replace(MODEL.attention, yarn=None, rope_theta=5e4)
    model = replace(MODEL, norm_eps=1e-5, init_std=0.3, max_length=128, attention=attention)
    config = small_run(tmp_path / "run", corpus, init_from=trained_run.directory, model=model)
    run(replace(config, num_steps=1))
    for name in ("norm_eps", "init_std", "max_length", "attention.yarn", "attention.rope_theta"):
        assert f"model.{name}=" in caplog.text

    def read(*_, **__):
        raise AssertionError("weights were read before the configs were compared")

    monkeypatch.setattr(start, "load_weights", read)
    wider = replace(model, intermediate_dim=64)
    with pytest.raises(ValueError, match=r"init_from=.*model\.intermediate_dim=48, not 64"):
        run(replace(config, directory=str(tmp_path / "other"), model=wider))
