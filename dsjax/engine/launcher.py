"""A thread that launches steps, one after the other."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

_Call = tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]


class Launcher:
    """Runs calls beside the thread that asks, in order.

    Its thread dies with the process. Python's executors end before other threads do, and refuse
    calls from then on: an engine that still ran would take that for a device that failed.
    """

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._newest: Future[Any] | None = None
        self._thread: threading.Thread | None = None
        weakref.finalize(self, self._calls.put, None).atexit = False

    def submit[T](self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        """Begins a call once all calls before it have ended."""
        if self._thread is None:
            # It holds the queue alone: who lets go of a launcher ends its thread.
            self._thread = threading.Thread(
                target=_run, args=(self._calls,), name="launch", daemon=True
            )
            self._thread.start()
        future: Future[T] = Future()
        self._newest = future
        self._calls.put((future, function, arguments))
        return future

    def wait(self) -> None:
        """Waits for the newest call, whatever becomes of it."""
        if self._newest is not None:
            wait([self._newest])
            self._newest = None

    def close(self) -> None:
        """Waits, and ends the thread."""
        self.wait()
        if self._thread is not None:
            self._calls.put(None)
            self._thread.join()
            self._thread = None


def _run(calls: queue.SimpleQueue[_Call | None]) -> None:
    while (call := calls.get()) is not None:
        future, function, arguments = call
        try:
            result = function(*arguments)
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)
            del result
        del call, future, function, arguments  # nothing is kept alive by a thread that waits
