"""Steps that a thread launches, and what breaks off."""

import subprocess
import sys
import time

import pytest

from dsjax.engine.launcher import Launcher
from tests.dsjax.engine.small_engine import an_engine, assert_greedy, random_requests, the_model
from tests.dsjax.training.small_runs import REPOSITORY


def test_calls_are_made_in_order_and_raise_where_they_are_waited_for():
    launcher = Launcher()
    made: list[int] = []

    def call(number: int) -> int:
        time.sleep(0.01)
        made.append(number)
        return 1 // (number - 3)

    futures = [launcher.submit(call, number) for number in range(6)]
    launcher.close()
    assert made == list(range(6))
    assert [future.exception() is None for future in futures] == [i != 3 for i in range(6)]


ENDS_EARLY = """
import weakref
from dsjax.engine import Request
from dsjax.inference.sampling import Sampling
from tests.dsjax.engine.small_engine import an_engine
engine = an_engine()
stream = engine.submit(Request((1, 2, 3), Sampling(max_tokens=100, ignore_eos=True)))
weakref.finalize(stream, lambda: print("closed first:", engine.gave_up is not None))
print(next(iter(stream)).tokens)
"""


def test_a_script_may_end_while_a_text_is_made():
    done = subprocess.run(
        [sys.executable, "-c", ENDS_EARLY], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert done.stdout.startswith("(")
    assert done.stdout.endswith("closed first: True\n")  # JAX traces no more once these have run
    assert "fail" not in done.stderr
    assert "terminate" not in done.stderr


def test_a_wait_for_a_launch_that_was_broken_off_harms_nothing(monkeypatch):
    """As Ctrl-C does in a notebook, while a thread launches a step."""
    engine = an_engine()
    read_rows, slow = engine._runner._read_rows, True

    def slowly(*arguments: object) -> object:
        if slow:
            time.sleep(0.2)
        return read_rows(*arguments)  # type: ignore[arg-type]

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine._runner, "_read_rows", slowly)
    monkeypatch.setattr(engine._loop, "_settle_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(random_requests(3, 2))
    monkeypatch.undo()
    slow = False
    requests = random_requests(4, 3)
    assert_greedy(requests, engine.generate(requests), the_model())
