"""The time of steps, and what is left out of it."""

import time

import jax
import pytest

from dsjax.config import MeshConfig
from dsjax.mesh import make_mesh
from dsjax.training.report import Throughput
from dsjax.training.schedule import Schedule
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
