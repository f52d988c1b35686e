"""`GET /metrics`: the engine's figures and the server's own, as Prometheus reads them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dsjax.serving.service import Service

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_TICK_SECONDS = 0.02
_LAGS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)

_COUNTERS = {
    "steps": "steps of the engine",
    "finished": "texts that have ended",
    "prompt_tokens": "tokens of prompts read, without those shared",
    "shared_tokens": "tokens of prompts that the pool held already",
    "tokens": "tokens generated",
    "preemptions": "times that a text had to give up its pages",
}
_GAUGES = {
    "num_waiting": "texts in the queue",
    "num_running": "texts that have pages",
    "pages_held": "pages that running texts hold",
    "pages_remembered": "pages whose content other prompts can share",
    "num_pages": "pages of the pool",
    "waited_share": "share of the time that the host waited for the device",
}
_TIMES = {
    "first_token": "time from arrival to the first token, of the newest texts",
    "between_tokens": "time between two tokens of a text, of the newest",
}


class Metrics:
    """The server's metrics.

    Attributes:
        worst_lag: seconds that the event loop was late at most.
    """

    def __init__(self, service: Service) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Engine(service))
        self._lag = Histogram(
            "dsjax_event_loop_lag_seconds",
            "how late the event loop runs what is due",
            buckets=_LAGS,
            registry=self._registry,
        )
        self._requests = Histogram(
            "dsjax_request_seconds",
            "time from a request's head to the end of its answer",
            ("path", "status"),
            buckets=(0.01, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 300),
            registry=self._registry,
        )
        self.worst_lag = 0.0

    def text(self) -> bytes:
        """Returns all of them."""
        return generate_latest(self._registry)

    def request(self, path: str, status: int, seconds: float) -> None:
        """Counts a request; of a path that the server has."""
        self._requests.labels(path, str(status)).observe(seconds)

    async def watch_loop(self) -> None:
        """Measures how late the event loop is, for ever."""
        time = asyncio.get_running_loop().time
        while True:
            due = time() + _TICK_SECONDS
            await asyncio.sleep(_TICK_SECONDS)
            lag = max(0.0, time() - due)
            self._lag.observe(lag)
            self.worst_lag = max(self.worst_lag, lag)


class _Engine(Collector):
    def __init__(self, service: Service) -> None:
        self._service = service

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        """Reads the figures."""
        figures = self._service.engine.figures()
        for name, said in _COUNTERS.items():
            yield CounterMetricFamily(f"dsjax_{name}", said, getattr(figures, name))
        for name, said in _GAUGES.items():
            gauge = f"dsjax_{name.removeprefix('num_')}"
            yield GaugeMetricFamily(gauge, said, getattr(figures, name))
        yield GaugeMetricFamily("dsjax_open", "texts that are made or wait", self._service.num_open)
        for name, said in _TIMES.items():
            family = GaugeMetricFamily(f"dsjax_{name}_seconds", said, labels=("quantile",))
            for percent in (50, 99):
                value = getattr(figures, f"{name}_p{percent}")
                if not math.isnan(value):
                    family.add_metric([str(percent / 100)], value)
            yield family
