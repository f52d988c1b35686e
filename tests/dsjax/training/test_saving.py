"""When a run saves: slow and failing storage, and what it costs the steps."""

import time
from pathlib import Path
from typing import Any

import pytest

from dsjax.config import CheckpointConfig, WatchConfig
from dsjax.processes import Watch
from dsjax.training import saving
from dsjax.training.saving import Saver

pytestmark = pytest.mark.core
STATE: Any = None  # what is saved is nothing to these


class Storage:
    """Stands in for `RunCheckpoints`: saves take `seconds`, and fail while `failing` is above 0."""

    def __init__(self, seconds: float = 0.0, failing: int = 0):
        self.seconds, self.failing = seconds, failing
        self.until = 0.0
        self.latest: int | None = None
        self.begun: list[int] = []
        self.num_reopened = 0
        self._under_way: int | None = None

    @property
    def is_saving(self) -> bool:
        return time.monotonic() < self.until

    def save(self, step: int, *_: object) -> None:
        self.wait()
        self.begun.append(step)
        self.until = time.monotonic() + self.seconds
        self._under_way = step

    def wait(self) -> None:
        time.sleep(max(0.0, self.until - time.monotonic()))
        step, self._under_way = self._under_way, None
        if step is not None and self.failing:
            self.failing -= 1
            raise RuntimeError("checkpoints: saving failed: no space left")
        self.latest = self.latest if step is None else step

    def reopen(self) -> None:
        self.num_reopened += 1


@pytest.fixture
def said() -> list[str]:
    return []


def saver_of(storage: Storage, said: list[str], monkeypatch, **config: Any) -> Saver:
    monkeypatch.setattr(saving, "optimizer_to_dict", lambda state: {})
    monkeypatch.setattr(storage, "save", lambda step, *rest: Storage.save(storage, step))

    class State:
        params = None

    monkeypatch.setitem(globals(), "STATE", State())
    checkpoint = CheckpointConfig(retry_seconds=0.01, **config)
    return Saver(storage, checkpoint, 1, Watch(WatchConfig()), said.append)  # type: ignore[arg-type]


def train(saver: Saver, first: int, last: int) -> None:
    for step in range(first, last + 1):
        if saver.is_due(step):
            saver.save(step, STATE, {})


def test_a_slow_save_is_waited_for_only_so_long(said, monkeypatch):
    storage = Storage(seconds=0.5)
    saver = saver_of(storage, said, monkeypatch, every=2, max_stall_seconds=0.1)
    began = time.monotonic()
    train(saver, 1, 6)
    assert time.monotonic() - began < 0.45  # it waited 0.1 s at step 4, and not again
    assert storage.begun == [2]
    assert said == ["step 4: the save before is not complete; this one is put off"]
    assert 0.1 <= saver.take_figures()["save_stall_seconds"] < 0.3
    time.sleep(0.5)
    train(saver, 7, 7)  # made up for as soon as the first is complete
    assert storage.begun == [2, 7]
    saver.finish(7, STATE, {})
    assert storage.latest == 7
    assert saver.take_figures()["save_seconds"] >= 0.5


def test_a_failed_save_is_tried_again_with_the_state_of_then(said, monkeypatch):
    storage = Storage(failing=2)
    saver = saver_of(storage, said, monkeypatch, every=5, retries=2)
    train(saver, 1, 6)
    assert storage.begun == [5]  # its retry waits 0.01 s
    time.sleep(0.02)
    train(saver, 7, 8)
    time.sleep(0.03)
    train(saver, 9, 9)
    assert storage.begun == [5, 7, 9]
    assert storage.num_reopened == 2
    expected = "checkpoints: saving failed: no space left; trying again in "
    assert said == [expected + "0.01 s, retry 1 of 2", expected + "0.02 s, retry 2 of 2"]
    train(saver, 10, 10)
    assert storage.latest == 9
    saver.finish(10, STATE, {})
    assert storage.latest == 10


def test_retries_are_bounded_at_the_end_too(said, monkeypatch):
    storage = Storage(failing=9)
    saver = saver_of(storage, said, monkeypatch, every=100, retries=2)
    with pytest.raises(RuntimeError, match=r"no space left \(3 times in a row\)$"):
        saver.finish(3, STATE, {})
    assert storage.begun == [3, 3, 3]
    assert len(said) == 2


def test_no_retry_is_one_line(said, monkeypatch):
    saver = saver_of(Storage(failing=1), said, monkeypatch, every=1, retries=0)
    train(saver, 1, 1)
    with pytest.raises(RuntimeError, match=r"no space left$"):
        train(saver, 2, 2)
    assert not said


def test_the_figures_of_a_run_say_what_its_saves_cost(trained_run):
    from tests.dsjax.training.small_runs import read_metrics

    lines = [line for line in read_metrics(Path(trained_run.directory)) if "loss" in line]
    assert {3, 5} <= {line["step"] for line in lines if "save_stall_seconds" in line}
    assert any("save_seconds" in line for line in lines)
