"""The paper's two stages: their numbers, and both in small, one from the other."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dsjax.config import SourceConfig
from dsjax.config.load import load_train_config
from dsjax.data.offline import pack
from dsjax.mesh import train_rules
from dsjax.mesh.axes import MESH_AXES
from dsjax.training.dry_run import dry_run
from dsjax.training.loop import fit
from dsjax.training.schedule import Schedule
from dsjax.training.start import check_batch
from tests.dsjax.training.small_runs import read_metrics

# The paper's shapes in small: 8 groups of experts, of which a token reaches 3.
TINY = [
    "model.vocab_size=264",
    "model.hidden_dim=32",
    "model.num_layers=2",
    "model.intermediate_dim=48",
    "model.init_std=0.1",
    "model.attention.num_heads=4",
    "model.attention.q_lora_rank=24",
    "model.attention.kv_lora_rank=16",
    "model.attention.qk_nope_head_dim=16",
    "model.attention.qk_rope_head_dim=8",
    "model.attention.v_head_dim=16",
    "model.moe.num_experts=16",
    "model.moe.top_k=3",
    "model.moe.intermediate_dim=16",
    "runtime.dtype=float32",
    "mesh.data=1",
    "mesh.fsdp=1",
    "mesh.expert=1",
    "mesh.tensor=1",
    "data.tokenizer=bytes",
    "log.every=1",
    "log.eval_every=0",
]


def test_pretraining_is_the_papers():
    run = load_train_config("v2_pretraining")
    schedule = Schedule(run)
    tokens_a_step = 9216 * 4096
    assert 8.1e12 <= schedule.total_tokens < 8.1e12 + tokens_a_step
    assert schedule.batch_sizes == (2304, 4608, 6912, 9216)
    full = next(step for step in range(20_000) if schedule.batch_size(step) == 9216)
    assert 225e9 <= schedule.tokens_before(full) < 225e9 + tokens_a_step
    rates = {step: schedule.learning_rate(step) for step in (0, 999, 1999, 2000)}
    assert rates == pytest.approx({0: 1.2e-7, 999: 1.2e-4, 1999: 2.4e-4, 2000: 2.4e-4})
    for share, before, after in ((0.6, 2.4e-4, 7.584e-5), (0.9, 7.584e-5, 2.3965e-5)):
        edge = np.searchsorted(
            [schedule.tokens_before(step) for step in range(run.num_steps)],
            share * schedule.total_tokens,
        )
        found = [schedule.learning_rate(int(step)) for step in (edge - 1, edge)]
        assert found == pytest.approx([before, after], rel=1e-4)
    moe, optimizer, loss = run.model.moe, run.optimizer, run.loss
    assert moe is not None
    assert loss.balance is not None
    assert loss.dropping is not None
    assert (moe.num_groups, moe.top_groups, moe.routing) == (8, 3, "group_limited_greedy")
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay) == (0.9, 0.95, 0.1)
    assert (optimizer.clip_norm, run.data.length, run.model.init_std) == (1.0, 4096, 0.006)
    balance = (loss.balance.expert, loss.balance.device, loss.balance.communication)
    assert balance == (0.003, 0.05, 0.02)
    assert (loss.dropping.capacity_factor, loss.dropping.undropped_fraction) == (1.0, 0.1)
    assert run.model.attention.yarn is None


def test_the_extension_is_the_papers_and_goes_on_from_pretraining():
    first, run = (load_train_config(name) for name in ("v2_pretraining", "v2_long_context"))
    assert run.init_from == first.directory
    assert (run.data.length, run.batch.size, run.num_steps) == (32_768, 576, 1000)
    yarn = run.model.attention.yarn
    assert yarn is not None
    assert (yarn.factor, yarn.beta_slow, yarn.beta_fast, yarn.original_length) == (40, 1, 32, 4096)
    assert (yarn.mscale, yarn.mscale_all_dim) == (0.707, 0.707)
    assert run.model.max_length == 160 * 1024
    last = Schedule(first).learning_rate(first.num_steps - 1)
    assert Schedule(run).learning_rate(500) == pytest.approx(last, rel=0.01)


@pytest.mark.parametrize("name", ["v2_pretraining", "v2_long_context"])
def test_its_mesh_divides_each_slice_of_the_batch(name: str):
    run = load_train_config(name)
    mesh: Any = jax.sharding.AbstractMesh(
        (run.mesh.data, run.mesh.fsdp, run.mesh.expert, 1, run.mesh.tensor),
        MESH_AXES,
    )
    assert mesh.size == 1152
    check_batch(run, train_rules(mesh))


@pytest.mark.slow
def test_both_stages_run_in_small_one_from_the_other(corpus: Path, tmp_path: Path, caplog):
    lengths = {"v2_pretraining": 32, "v2_long_context": 128}
    small = {
        "v2_pretraining": [
            "batch.size=16",
            "batch.initial_size=4",
            "batch.ramp_tokens=384",
            "batch.ramp_stages=2",
            "num_steps=14",
            "optimizer.warmup_steps=2",
            "optimizer.peak_learning_rate=3e-3",
        ],
        "v2_long_context": ["batch.size=4", "num_steps=3", "optimizer.warmup_steps=1"],
    }
    runs = {}
    for name, length in lengths.items():
        packed = tmp_path / name / "packed"
        pack([SourceConfig(str(corpus), "jsonl")], packed, tokenizer="bytes", length=length)
        runs[name] = load_train_config(
            name,
            [
                *TINY,
                *small[name],
                f"data.length={length}",
                f"data.sources.0.path={packed}",
                f"data.eval_sources.0.path={packed}",
                f"directory={tmp_path / name / 'run'}",
                *([f"init_from={tmp_path / 'v2_pretraining' / 'run'}"] if "long" in name else []),
            ],
        )
    first, second = runs.values()
    fit(first, devices=jax.devices()[:1])
    lines = [line for line in read_metrics(Path(first.directory)) if "loss" in line]
    # 128 tokens a step until 384 are read, then 512.
    assert [line["batch_size"] for line in lines] == [4] * 3 + [16] * 11
    assert len({line["learning_rate"] for line in lines}) == 4  # warming up, full, and two decays
    assert all(0 < line["dropped_share"] < 0.6 for line in lines)
    assert all(0 < line["router_entropy"] <= np.log(16) + 1e-6 for line in lines)
    assert all(len(line["device_load"][0]) == 8 for line in lines)

    assert not Path(second.directory).exists()
    figures = dry_run(second, devices=jax.devices()[:1])
    assert (figures["resumes_at"], figures["tokens"]) == (0, 3 * 4 * 128)
    assert "going on with this run's" in caplog.text  # YaRN and the length differ
    assert not Path(second.directory).exists()
    fit(second, devices=jax.devices()[:1])
    longer = [line["cross_entropy"] for line in read_metrics(Path(second.directory))[:3]]
    # It begins with what the first stage learned, which was next to nothing at the first's start.
    assert longer[0] < lines[0]["cross_entropy"] - 0.3
    stored = json.loads((Path(second.directory) / "run.json").read_text())
    assert stored["model"]["attention"]["yarn"]["factor"] == 40
