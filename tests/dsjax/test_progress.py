"""What a person sees of a long job: a bar on a terminal, lines in a log."""

import io
import re
import sys

import pytest

from dsjax import progress
from dsjax.progress import JobProgress

pytestmark = pytest.mark.core


class Terminal(io.StringIO):
    """Standard error, as a terminal has it."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def standard_error(monkeypatch):
    """Puts a stream in the place of standard error; called in the test, after pytest's capture."""

    def replace(stream: io.StringIO) -> io.StringIO:
        monkeypatch.setattr(sys, "stderr", stream)
        return stream

    return replace


def test_bytes_in_a_log(standard_error, monkeypatch):
    log = standard_error(io.StringIO())
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    with JobProgress("converting", 4_000_000_000, 1_000_000_000, unit="bytes") as shown:
        shown.advance(1_000_000_000)
    first, second, last = log.getvalue().splitlines()
    assert first == "converting: going on at 1.00 GB"
    assert re.fullmatch(r"converting:  50% of 4\.00 GB, [\d.]+ GB/s", second)
    assert last.startswith("converting:  50% of 4.00 GB")


def test_a_log_gets_no_line_a_document(standard_error):
    log = standard_error(io.StringIO())
    with JobProgress("packing", 3, unit="documents") as shown:
        for _ in range(3):
            shown.advance(1)
    (line,) = log.getvalue().splitlines()
    assert re.fullmatch(r"packing: 100% of 3 documents, [\d,]+ documents/s", line)


def test_a_job_that_fails_does_not_say_that_it_is_done(standard_error):
    log = standard_error(io.StringIO())
    with pytest.raises(KeyError), JobProgress("packing", 3, unit="documents"):
        raise KeyError
    assert log.getvalue() == ""


def test_steps_write_their_own_lines(standard_error):
    log = standard_error(io.StringIO())
    with JobProgress("training", 9, unit="steps") as shown:
        shown.reach(2)
        shown.note("loss 1.5")
        shown.say("[saved]")
    assert log.getvalue() == "step 2/9 loss 1.5\n[saved]\n"


def test_a_terminal_gets_a_bar_with_the_figures_beside_it(standard_error):
    terminal = standard_error(Terminal())
    with JobProgress("training", 9, unit="steps") as shown:
        shown.reach(2)
        shown.note("loss 1.5")
        shown.say("[saved]")
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    assert "loss 1.5" in text
    assert "2/9 steps" in text
    assert "[saved]" in text


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_what_is_not_shown_is_not_written(kind: type[io.StringIO], standard_error):
    stream = standard_error(kind())
    with JobProgress("converting", 9, 2, unit="bytes", shown=False) as shown:
        shown.advance(7)
        shown.say("done")
    assert stream.getvalue() == ""
