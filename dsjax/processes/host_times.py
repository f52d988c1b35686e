"""What each host needs for its own work in a step, so that one that holds up all is named.

Devices wait for one another in every step, so a step takes the same time everywhere and says
nothing of whose fault it is. What does is time that waits for no other host: to read and place the
host's rows, and to run one small computation on its devices (`checks.repeat_every`).
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dsjax.processes.heartbeat import Heartbeat


class HostTimes:
    """Measures this host's own work, and finds the slow hosts among all."""

    def __init__(self, slow_share: float, say: Callable[[str], None]):
        """Prepares to measure.

        Args:
            slow_share: `watch.slow_share`.
            say: takes a line for the user.
        """
        self._slow_share, self._say = slow_share, say
        self._seconds, self._count = 0.0, 0
        self._named: set[str] = set()

    @contextlib.contextmanager
    def own_work(self) -> Iterator[None]:
        """Measures the body, a step's work that waits for no other host."""
        began = time.monotonic()
        yield
        self._seconds += time.monotonic() - began
        self._count += 1

    def figures(
        self, heartbeat: Heartbeat, probe_seconds: float | None, step_seconds: float | None
    ) -> dict[str, Any]:
        """Returns this host's figures since the last call, and on the first process the slow hosts.

        The others' figures travel with their signs of life, so they are a few seconds old.

        Args:
            heartbeat: tells the others, and what they told.
            probe_seconds: of the last computation on this host's devices, or None.
            step_seconds: of a step, or None where it is not known.
        """
        own = {"input_seconds": self._seconds / max(self._count, 1)}
        self._seconds, self._count = 0.0, 0
        heartbeat.tell(**own, probe_seconds=probe_seconds)
        slow = {}
        if heartbeat.index == 0 and step_seconds is not None:
            slow = slow_hosts(heartbeat.others(), step_seconds, self._slow_share)
        for host in slow.keys() - self._named:
            self._say(f"SLOW: {slow[host]}")
        self._named = set(slow)
        found: dict[str, Any] = {"input_seconds": round(own["input_seconds"], 6)}
        return found | ({"slow_hosts": sorted(slow.values())} if slow else {})


def slow_hosts(
    said: Mapping[int, Mapping[str, Any]], step_seconds: float, share: float
) -> dict[str, str]:
    """Finds the hosts that need longer than the others for their own work.

    Args:
        said: by process: `host`, and where known `input_seconds` of a step and `probe_seconds`.
        step_seconds: of a step.
        share: of a step that a host's input may take more than the median host's; and of the
            median's time that its devices' computation may.

    Returns:
        A line for each, by its process and host.
    """
    slow = {}
    for name, what in (
        ("input_seconds", "reading its rows takes"),
        ("probe_seconds", "the same computation takes its devices"),
    ):
        times = {index: one[name] for index, one in said.items() if one.get(name) is not None}
        if len(times) < 2:
            continue
        median = statistics.median_low(times.values())
        allowed = share * (step_seconds if name == "input_seconds" else median)
        for index, seconds in times.items():
            if seconds - median > allowed:
                host = f"process {index} (host {said[index]['host']})"
                slow[host] = f"{host}: {what} {seconds:.3g} s, the median host's {median:.3g} s"
    return slow
