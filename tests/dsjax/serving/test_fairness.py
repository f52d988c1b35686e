"""No text, request or collection of garbage holds up the event loop for others."""

import asyncio
import gc
import sys

from dsjax.engine import TextPiece
from dsjax.serving.gate import Gate, Keys
from dsjax.serving.server import shared_interpreter
from dsjax.serving.texts import Handover, Texts


def test_a_steps_texts_are_given_out_a_few_at_a_time():
    async def run() -> list[int]:
        handover = Handover(asyncio.get_running_loop())
        given: list[int] = []
        turn = 0

        class Noting(Texts):
            def take(self, index, event):
                given.append(turn)
                super().take(index, event)

        texts = Noting(200, lambda: None)
        for index in range(200):
            handover.put(texts, index, TextPiece("a", (1,)))
        handover.flush()
        handover.flush()  # of the next step, before this one's are out
        while len(given) < 200:
            await asyncio.sleep(0)
            turn += 1
        pieces = [index async for index in first(texts.events())]
        assert [index for index, _ in pieces[0]] == list(range(200))
        return given

    given = asyncio.run(run())
    assert max(given.count(turn) for turn in set(given)) <= 32


async def first(events):
    """Gives the first of many."""
    async for one in events:
        yield one
        return


def test_requests_that_come_at_once_begin_one_after_another():
    async def run() -> list[int]:
        turn, begun = 0, []

        async def app(scope, receive, send):
            begun.append(turn)

        gate = Gate(app, Keys(()), False, lambda *_: None)
        scope = {"type": "http", "path": "/health", "method": "GET", "headers": []}

        async def nothing(*_: object) -> dict:
            return {}

        asked = [asyncio.ensure_future(gate(dict(scope), nothing, nothing)) for _ in range(20)]  # type: ignore[arg-type]
        while not all(one.done() for one in asked):
            await asyncio.sleep(0)
            turn += 1
        return begun

    begun = asyncio.run(run())
    assert len(begun) == len(set(begun)) == 20


def test_a_server_keeps_what_is_there_out_of_garbage_collection():
    before = sys.getswitchinterval()
    with shared_interpreter():
        assert gc.get_freeze_count() > 10_000
        assert sys.getswitchinterval() < before
    assert gc.get_freeze_count() == 0
    assert sys.getswitchinterval() == before
