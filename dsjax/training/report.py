"""The figures of a run: of one step, and of the time between steps."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dsjax.chips import peak_flops
from dsjax.config import TrainConfig
from dsjax.counts import train_flops_per_token
from dsjax.training.schedule import Schedule
from dsjax.training.step import SKIP_REASONS, StepReport


class Throughput:
    """Turns the time between reports into step time, tokens per second and MFU."""

    def __init__(self, config: TrainConfig, schedule: Schedule, mesh: Mesh):
        self._schedule = schedule
        self._flops_per_token = train_flops_per_token(
            config.model, config.data.length, config.optimizer.frozen
        )
        peak = peak_flops(mesh.devices.flat[0])
        self._peak = None if peak is None else peak * mesh.size
        self._since: tuple[int, float] | None = None

    def restart(self, step: int) -> None:
        """Starts to count at a step; called after compilation and evaluation."""
        self._since = (step, time.perf_counter())

    @contextlib.contextmanager
    def leaving_out(self) -> Iterator[None]:
        """Leaves the time of the body out, such as that of waiting for a save."""
        began = time.perf_counter()
        yield
        if self._since is not None:
            self._since = (self._since[0], self._since[1] + time.perf_counter() - began)

    def figures(self, step: int) -> dict[str, float]:
        """Returns the mean figures since the last call or restart."""
        if self._since is None or self._since[0] >= step:
            return {}
        first, began = self._since
        seconds = time.perf_counter() - began
        self.restart(step)
        tokens = self._schedule.tokens_before(step) - self._schedule.tokens_before(first)
        figures = {"step_seconds": seconds / (step - first), "tokens_per_second": tokens / seconds}
        if self._peak is not None:
            figures["mfu"] = figures["tokens_per_second"] * self._flops_per_token / self._peak
        return figures


def step_figures(report: StepReport, num_groups: int = 1) -> dict[str, Any]:
    """Returns a step's report as plain numbers, waiting for the step to end.

    Args:
        report: of one step.
        num_groups: groups of experts, each of which is a device to the paper (§2.2.2).
    """
    report = jax.device_get(report)
    loss = report.loss
    figures: dict[str, Any] = {
        "loss": float(loss.total),
        "cross_entropy": float(loss.cross_entropy),
        "z_loss": float(loss.z),
        "balance_expert": float(loss.balance_expert),
        "balance_device": float(loss.balance_device),
        "balance_communication": float(loss.balance_communication),
        "gradient_norm": float(report.gradient_norm),
        "dropped_share": float(loss.dropped),
        "skipped": SKIP_REASONS[int(report.skip_reason)],
    }
    if loss.load_LE.size:
        share_LE = loss.load_LE / np.maximum(loss.load_LE.sum(-1, keepdims=True), 1)
        share_LG = share_LE.reshape(len(share_LE), num_groups, -1).sum(-1)
        for name, share in (("", share_LE), ("device_", share_LG)):
            # 1 is perfect balance: in each layer the busiest one over the mean.
            imbalance_L = share.max(-1) * share.shape[-1]
            figures[f"{name}load_imbalance"] = float(imbalance_L.max())
            figures[f"{name}load_imbalance_mean"] = float(imbalance_L.mean())
            figures[f"{name or 'expert_'}load"] = np.round(share.astype(np.float64), 5).tolist()
    if loss.entropy_L is not None:
        figures["router_entropy"] = float(loss.entropy_L.mean())
        figures["router_entropy_layers"] = np.round(loss.entropy_L.astype(np.float64), 4).tolist()
    return figures


def one_line(figures: dict[str, Any]) -> str:
    """Returns the figures that a person watches."""
    formats = {
        "loss": "loss {:.4f}",
        "gradient_norm": "norm {:.3f}",
        "learning_rate": "lr {:.2e}",
        "step_seconds": "{:.3f} s/step",
        "tokens_per_second": "{:,.0f} tok/s",
        "mfu": "mfu {:.1%}",
    }
    parts = [text.format(figures[name]) for name, text in formats.items() if name in figures]
    if figures.get("skipped"):
        parts.append(f"SKIPPED: {figures['skipped']}")
    return " · ".join(parts)
