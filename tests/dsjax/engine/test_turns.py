"""In which order a turn does what it does."""

from typing import Any

import numpy as np
import pytest

from dsjax.engine import Request
from dsjax.engine.packing import LastSent
from dsjax.engine.runner import Runner
from dsjax.inference.sampling import Sampling
from tests.dsjax.engine.small_engine import MODEL_CONFIG, an_engine


class AnyToken:
    """A grammar that allows everything, and says what it was told."""

    def __init__(self) -> None:
        self.told: list[int] = []

    def allowed(self) -> np.ndarray:
        return np.full(-(-MODEL_CONFIG.vocab_size // 32), 2**32 - 1, np.uint32)

    def advance(self, token: int) -> None:
        self.told.append(token)


@pytest.mark.parametrize("mask", [None, AnyToken()])
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
    assert mask is None or mask.told == list(found.tokens)


def test_what_says_the_same_is_sent_once():
    sent: list[np.ndarray] = []

    def put(array: np.ndarray) -> Any:
        sent.append(array)
        return len(sent)

    send = LastSent(put)
    assert [send(np.array(x)) for x in ([1, 2], [1, 2], [1, 3], [1, 2], [1, 2, 0])] == [
        1,
        1,
        2,
        3,
        4,
    ]
