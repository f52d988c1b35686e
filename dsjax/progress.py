"""How far a long job is, on standard error: a bar on a terminal, lines in a log."""

from __future__ import annotations

import sys
import time
from typing import Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

_SECONDS_BETWEEN_LINES = 15.0

Unit = Literal["bytes", "documents", "requests", "steps"]


class JobProgress:
    """How far one job is, counted in bytes, documents, requests or steps.

    A log gets a line now and then, and one at the end. A job counted in steps writes its own lines,
    by `note`.
    """

    def __init__(self, what: str, total: int, done: int = 0, *, unit: Unit, shown: bool = True):
        """Begins to show a job.

        Args:
            what: the job, such as "converting".
            total: its size.
            done: how much of it an earlier run has done.
            unit: what is counted.
            shown: False shows nothing.
        """
        console = Console(file=sys.stderr)
        on_terminal = shown and console.is_terminal
        self._what, self._total, self._unit = what, total, unit
        self._done = self._done_before = done
        self._shown, self._in_log = shown, shown and not on_terminal
        self._start = self._last_line = time.monotonic()
        columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn()]
        if unit == "bytes":
            columns += [DownloadColumn(), TransferSpeedColumn()]
        else:
            columns += [MofNCompleteColumn(), TextColumn(unit)]
        self._bar = Progress(
            *columns, TimeRemainingColumn(), console=console, disable=not on_terminal
        )
        self._task = self._bar.add_task(what, total=total, completed=done)
        if self._in_log and done and unit != "steps":
            self.say(f"{what}: going on at {self._amount(done)}")

    def advance(self, count: int) -> None:
        """Counts what has been done since the last call."""
        self.reach(self._done + count)

    def reach(self, done: int) -> None:
        """Sets how much has been done in all."""
        self._done = done
        self._bar.update(self._task, completed=done)
        if time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._write_line()

    def note(self, text: str) -> None:
        """Shows figures of the job as it is now: beside the bar, or as a line of a log."""
        self._bar.update(self._task, description=text)
        if self._in_log:
            self.say(f"{self._unit.removesuffix('s')} {self._done}/{self._total} {text}")

    def say(self, text: str) -> None:
        """Shows a line that stays."""
        if self._in_log:
            print(text, file=sys.stderr, flush=True)
        elif self._shown:
            self._bar.console.print(text, highlight=False, markup=False)

    def _amount(self, count: int) -> str:
        return f"{count / 1e9:.2f} GB" if self._unit == "bytes" else f"{count:,} {self._unit}"

    def _write_line(self) -> None:
        self._last_line = time.monotonic()
        if not self._in_log or self._unit == "steps":
            return
        rate = (self._done - self._done_before) / max(self._last_line - self._start, 1e-9)
        share = self._done / self._total if self._total else 1.0
        self.say(
            f"{self._what}: {share:4.0%} of {self._amount(self._total)}, "
            f"{self._amount(round(rate))}/s"
        )

    def __enter__(self) -> JobProgress:
        self._bar.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._bar.stop()
        if kind is None:
            self._write_line()
