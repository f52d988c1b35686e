"""Signs of life between the processes of a run, through JAX's coordination service.

Each process writes a line every two seconds. The first one reads all of them and writes what it
found, which the others read: two small calls a process and beat, however many there are. JAX's own
heartbeats only end a process, and say neither which one was lost nor what the others were doing.
"""

from __future__ import annotations

import itertools
import json
import socket
import threading
import time
from typing import Any

import jax
from jax._src import distributed

SECONDS_BETWEEN_BEATS = 2.0
_RUNS = itertools.count()  # every process counts the same runs


class Heartbeat:
    """Writes this process's signs of life and reads the others', in a thread of its own.

    Attributes:
        host: the name of this process's machine.
        index: this process's place; asked once, because at the exit JAX knows it no more.
    """

    def __init__(self) -> None:
        self.host = socket.gethostname()
        self.index, self._count = jax.process_index(), jax.process_count()
        self._folder = f"dsjax/{next(_RUNS)}/"
        self._client: Any = distributed.global_state.client
        self._own: dict[str, Any] = {"host": self.host, "state": "alive"}
        self._others: dict[int, dict[str, Any]] = {}
        self._heard: dict[int, float] = {}
        self._verdict = ""
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Begins; a process that is alone has nobody to tell."""
        if self._count > 1 and self._client is not None:
            self._thread.start()

    @property
    def is_heard(self) -> bool:
        """Whether there is another process that hears this one."""
        return self._thread.is_alive()

    def tell(self, **figures: Any) -> None:
        """Says more in the next signs of life; JSON values."""
        self._own = {**self._own, **figures}

    def stop(self, state: str) -> None:
        """Tells the others that this process is done, and says no more."""
        self.tell(state=state)
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(2 * SECONDS_BETWEEN_BEATS)

    def all_ended(self) -> bool:
        """Whether the others have come to their end, well or not, as far as this process hears."""
        heard = self._count - 1 if self.index == 0 else 1
        ended = [said["state"] != "alive" for said in dict(self._others).values()]
        return len(ended) >= heard and all(ended)

    def others(self) -> dict[int, dict[str, Any]]:
        """Returns what the processes said last; all of them on the first process alone."""
        return {self.index: self._own} | self._others

    def failed(self) -> str:
        """Returns which process has failed, and of what; "" for none."""
        for index, said in sorted(dict(self._others).items()):
            if said["state"] == "failed":
                return f"process {index} ({said['host']}) failed: {said.get('message', '')}"
        return ""

    def lost(self, seconds: float, now: float) -> str:
        """Returns which process has been silent for so long; "" for none.

        Args:
            seconds: silence that counts as loss.
            now: `time.monotonic()`, less what this process itself stood still.
        """
        if self._verdict:
            return self._verdict
        for index, said in sorted(dict(self._others).items()):
            if said["state"] == "alive" and now - self._heard[index] > seconds:
                name = f"process {index} ({said['host']})"
                return f"{name} has given no sign of life for {seconds:.0f} s"
        return ""

    def shift(self, seconds: float) -> None:
        """Leaves out a time in which this process itself stood still."""
        self._heard = {index: at + seconds for index, at in self._heard.items()}

    def publish(self, verdict: str) -> None:
        """Tells the others who is lost or failed, where this is the process that hears all.

        JAX ends the others at once when the first process goes, so it stays until they have heard.
        """
        if self.index == 0 and self.is_heard:
            self.tell(verdict=verdict)
            time.sleep(2 * SECONDS_BETWEEN_BEATS)

    def _beat(self) -> None:
        for number in itertools.count():
            self._own["number"] = number
            try:
                self._write()
                self._read()
            except (RuntimeError, ValueError):
                pass  # silence is what counts
            if self._stopped.is_set():
                return
            self._stopped.wait(SECONDS_BETWEEN_BEATS)

    def _write(self) -> None:
        text = json.dumps(self._own)
        self._client.key_value_set(f"{self._folder}{self.index}", text, allow_overwrite=True)

    def _read(self) -> None:
        """Reads what the others said: the first process all of them, the others the first."""
        if self.index == 0:
            pairs = self._client.key_value_dir_get(self._folder)
        else:
            # Nothing is there until the first process has written.
            pairs = [("0", self._client.key_value_try_get(f"{self._folder}0"))]
        for key, text in pairs:
            index, said = int(key.rpartition("/")[2]), json.loads(text)
            if index != self.index and said != self._others.get(index):
                self._heard[index] = time.monotonic()
                self._others[index] = said
                self._verdict = said.get("verdict", "")
