"""The figures of a step: its time, what is left out of it, and its routers."""

import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from dsjax.config import MeshConfig
from dsjax.mesh import make_mesh
from dsjax.training.losses import LossTerms
from dsjax.training.report import Throughput, step_figures
from dsjax.training.schedule import Schedule
from dsjax.training.step import StepReport
from tests.dsjax.training.small_runs import small_run


def test_waiting_for_a_save_is_no_steps_time(tmp_path):
    config = small_run(tmp_path, tmp_path)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    throughput = Throughput(config, Schedule(config), mesh)
    throughput.restart(0)
    with throughput.leaving_out():
        time.sleep(0.3)
    figures = throughput.figures(1)
    assert figures["step_seconds"] < 0.2
    assert figures["tokens_per_second"] == pytest.approx(
        8 * config.data.length / figures["step_seconds"]
    )


def test_loads_are_of_experts_and_of_groups_and_the_worst_layer_is_told_from_the_mean():
    load_LE = jnp.array([[6.0, 2, 2, 2, 2, 2, 0, 0], [2.0] * 8])
    zeros = {name: jnp.zeros(()) for name in ("total", "cross_entropy", "z", "dropped")}
    balance = {f"balance_{name}": jnp.zeros(()) for name in ("expert", "device", "communication")}
    terms = LossTerms(**zeros, **balance, load_LE=load_LE, entropy_L=jnp.array([1.0, 2.0]))
    report = StepReport(terms, jnp.zeros(()), jnp.int32(0), jnp.int32(0))
    figures = step_figures(report, num_groups=4)
    assert figures["load_imbalance"] == pytest.approx(6 / 2)  # 16 assignments of 8 experts
    assert figures["load_imbalance_mean"] == pytest.approx((3 + 1) / 2)
    assert figures["device_load_imbalance"] == pytest.approx(8 / 4)
    assert figures["device_load_imbalance_mean"] == pytest.approx(1.5)
    assert figures["device_load"] == [[0.5, 0.25, 0.25, 0.0], [0.25] * 4]
    assert figures["router_entropy"] == 1.5
    assert figures["router_entropy_layers"] == [1.0, 2.0]
    assert "router_entropy" not in step_figures(
        replace(report, loss=replace(terms, entropy_L=None))
    )
