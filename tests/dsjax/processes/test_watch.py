"""What a run waits for is bounded, and whoever is lost is named."""

import time
from dataclasses import replace

import pytest

from dsjax.config import WatchConfig
from dsjax.processes import Watch
from dsjax.processes.heartbeat import Heartbeat

pytestmark = pytest.mark.core

QUICK = WatchConfig(step_seconds=0.2, step_factor=5, compile_seconds=9, save_seconds=0.3)


def ended_with(config: WatchConfig, body) -> list[str]:
    ends: list[str] = []
    with Watch(config, ends.append) as watch:
        body(watch)
    return ends


def test_a_step_that_stands_still_is_named():
    def stand(watch: Watch) -> None:
        watch.step(7)
        time.sleep(1.5)

    assert ended_with(QUICK, stand) == ["step 7 took more than 0.2 s"]


def test_each_kind_of_waiting_has_its_own_limit():
    def compile_and_save(watch: Watch) -> None:
        watch.step(1)
        with watch.waiting("step 2, which compiles", 9):
            time.sleep(1.2)
        with watch.waiting("saving step 2", 0.3):
            time.sleep(1.2)

    assert ended_with(QUICK, compile_and_save) == ["saving step 2 took more than 0.3 s"]


def test_a_step_may_take_five_medians():
    watch = Watch(replace(QUICK, step_seconds=30), lambda _: None)
    assert watch.step_limit == 30
    watch._steps.extend([8.0, 9.0, 100.0])
    assert watch.step_limit == 45


def test_waiting_is_no_steps_time():
    with Watch(WatchConfig(), lambda _: None) as watch:
        watch.step(1)
        with watch.waiting("saving", 10):
            pass
        watch.step(2)
        assert not watch._steps
        watch.step(3)
        assert len(watch._steps) == 1


def test_silence_is_loss_and_an_end_is_not():
    heartbeat = Heartbeat()
    heartbeat._others = {
        1: {"host": "b", "state": "alive"},
        2: {"host": "c", "state": "done"},
    }
    heartbeat._heard = {1: 100.0, 2: 0.0}
    assert heartbeat.lost(20, 119.0) == ""
    assert heartbeat.lost(20, 121.0) == "process 1 (b) has given no sign of life for 20 s"
    heartbeat.shift(10)  # this process stood still itself
    assert heartbeat.lost(20, 121.0) == ""
    assert heartbeat.failed() == ""
    heartbeat._others[2] |= {"state": "failed", "message": "no such file"}
    assert heartbeat.failed() == "process 2 (c) failed: no such file"


@pytest.mark.parametrize("seconds", [5, 25])
def test_all_must_end_in_30_seconds(seconds: float):
    with pytest.raises(ValueError, match=r"^watch.peer_seconds=\d+: must be from 6"):
        WatchConfig(peer_seconds=seconds)
