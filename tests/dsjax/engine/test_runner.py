"""Which programs the device's side of the engine runs."""

from dataclasses import replace

from dsjax.engine import Request
from dsjax.engine.programs import RowShape
from dsjax.engine.shapes import Shapes
from dsjax.engine.state import ChunkShape
from dsjax.inference.sampling import Sampling
from tests.dsjax.engine.small_engine import an_engine


def test_what_begins_a_prompt_attends_to_nothing_cached(monkeypatch):
    """A program for it has no loop over cached keys, which a GPU's host would have to wait for."""
    with an_engine() as engine:
        runner = engine._runner
        runner.shapes = replace(runner.shapes, knows_first=True)  # as where all are compiled first
        shapes, program = [], runner.program

        def note(key):
            if isinstance(key, RowShape) and key.chunk is not None:
                shapes.append(key)
            return program(key)

        monkeypatch.setattr(runner, "program", note)
        request = Request(tuple(range(40)), Sampling(max_tokens=1))
        (alone,) = engine.generate([request])
        assert [shape.is_first for shape in shapes] == [True, False, False]
        shapes.clear()
        assert engine.generate([request]) == [alone]  # what is shared is attended to
        assert [shape.is_first for shape in shapes] == [False]


def test_programs_for_few_sequences_are_for_short_chunks_alone():
    chunks = (ChunkShape(1, 2), ChunkShape(2, 8))
    shapes = Shapes((1, 4), 4, chunks).rows()
    beside = {chunk: {s.num_decoding for s in shapes if s.chunk == chunk} for chunk in chunks}
    assert beside == {chunks[0]: {1, 4}, chunks[1]: {4}}
