"""Fields of a run that another field switches off are named."""

import pytest

from dsjax.config import TrainConfig
from dsjax.config.load import load_config, load_train_config, named_configs
from dsjax.config.unused import fields_without_effect

pytestmark = pytest.mark.core


def test_runs_that_come_with_the_package_have_no_field_without_effect():
    configs = [load_config(name) for name in named_configs()]
    runs = [config for config in configs if isinstance(config, TrainConfig)]
    assert runs
    for run in runs:
        assert fields_without_effect(run) == [], run.directory


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["batch.ramp_tokens=9"], "batch.ramp_tokens=9 has no effect: without batch.initial_size"),
        (["model.num_dense_layers=4", "model.num_layers=4"], "model.moe=MoEConfig("),
        (["model.num_dense_layers=4", "model.num_layers=4"], "loss.balance=BalanceConfig("),
        (
            ["model.num_dense_layers=4", "model.num_layers=4", "loss.router_entropy=true"],
            "loss.router_entropy=True has no effect: the model has no layers of experts",
        ),
        (["runtime.kernels.exchange_chunks=2"], "exchange_chunks=2 has no effect: mesh.expert=1"),
        (
            ["runtime.kernels.latent_exchange=ring"],
            "latent_exchange='ring' has no effect: mesh.con",
        ),
        (["runtime.kernels.mla_decode=xla"], "mla_decode='xla' has no effect: training decodes"),
        (
            ["num_steps=9"],
            "rate=0.003 is not reached: num_steps=9 end in the warm-up",
        ),
        (["optimizer.decay_at=[]", "optimizer.decay_factor=0.1"], "optimizer.decay_at is empty"),
        (
            ["data.eval_sources=[]", "log.eval_rows=8", "data.prepare=none"],
            "log.eval_rows=8 has no",
        ),
        (["init_from=x", "seed=3"], "seed=3 has no effect: init_from gives the weights"),
        (["checkpoint.every=10", "checkpoint.keep_every=15"], "keep_every=15 is no multiple of"),
        (["data.long_documents=error"], "data.long_documents='error' has no effect: data.sources"),
    ],
)
def test_a_field_that_another_switches_off_is_said(overrides, said):
    config = load_train_config("quickstart", overrides)
    assert any(said in line for line in fields_without_effect(config))
