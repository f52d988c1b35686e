"""In which order a turn does what it does."""

from typing import Any

import numpy as np
import pytest

from dsjax.engine import Request
from dsjax.engine.packing import LastSent
from dsjax.engine.runner import Runner
from dsjax.inference.sampling import Sampling
from tests.dsjax.engine.small_engine import Alternating, an_engine


@pytest.mark.parametrize("mask", [None, Alternating()])
def test_a_choice_is_launched_before_the_host_knows_the_token_before(mask, monkeypatch):
    """The device has the next choice to go on with while the host takes a token; a grammar none."""
    order: list[str] = []
    with an_engine() as engine:
        choose, settle = Runner.choose, engine._loop._settle_step

        def noted_choose(*given: Any) -> Any:
            order.append("choose")
            return choose(*given)

        def noted_settle() -> None:
            order.append("settle")
            settle()

        monkeypatch.setattr(Runner, "choose", noted_choose)
        monkeypatch.setattr(engine._loop, "_settle_step", noted_settle)
        (found,) = engine.generate([Request((1, 2), Sampling(max_tokens=6), mask=mask)])
    pairs = ["settle", "choose"] if mask else ["choose", "settle"]
    assert order[:8] == pairs * 4
    assert mask is None or mask.taken == list(found.tokens)


def test_what_says_the_same_is_sent_once():
    sent: list[np.ndarray] = []

    def put(array: np.ndarray) -> Any:
        sent.append(array)
        return len(sent)

    send = LastSent(put)
    arrays = ([1, 2], [1, 2], [1, 3], [1, 2], [1, 2, 0])
    assert [send(np.array(array)) for array in arrays] == [1, 1, 2, 3, 4]
