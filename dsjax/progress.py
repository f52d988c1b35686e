"""How far a long job is: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

_SECONDS_BETWEEN_LINES = 15.0


class ByteProgress:
    """Progress counted in bytes, on standard error."""

    def __init__(self, what: str, total: int, finished: int = 0, *, shown: bool = True):
        """Begins to show a job.

        Args:
            what: the job, such as "converting".
            total: its bytes.
            finished: bytes that an earlier run has done.
            shown: False shows nothing.
        """
        console = Console(stderr=True)
        self._what, self._total = what, max(total, 1)
        self._finished, self._started_at = finished, finished
        self._lines = shown and not console.is_terminal
        self._start = self._last_line = time.monotonic()
        self._bar = Progress(
            TextColumn(what),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not (shown and console.is_terminal),
        )
        self._task = self._bar.add_task(what, total=total, completed=finished)
        if self._lines and finished:
            self._print(f"going on at {finished / 1e9:.2f} GB")

    def advance(self, num_bytes: int) -> None:
        """Counts bytes that are done."""
        self._finished += num_bytes
        self._bar.advance(self._task, num_bytes)
        now = time.monotonic()
        if now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            self._line()

    def _line(self) -> None:
        seconds = max(time.monotonic() - self._start, 1e-9)
        self._print(
            f"{self._finished / self._total:4.0%} of {self._total / 1e9:.2f} GB, "
            f"{(self._finished - self._started_at) / seconds / 1e9:.2f} GB/s"
        )

    def _print(self, text: str) -> None:
        if self._lines:
            self._bar.console.print(f"{self._what}: {text}", highlight=False)

    def __enter__(self) -> ByteProgress:
        self._bar.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._bar.stop()
        if kind is None:
            self._line()
