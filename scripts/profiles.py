"""What a GPU does in some steps, read out of JAX's profile: its kernels, and when it has none."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

TOP = 40
LEAST_GAP = 5_000  # nanoseconds


class Kernel(NamedTuple):
    """A kernel or a copy that ran.

    Attributes:
        name: as the device knows it.
        operation: XLA's, where that is known.
        duration: in nanoseconds.
        begin: when it began, where that is known.
    """

    name: str
    operation: str
    duration: float
    begin: float | None = None


def kernels_in(folder: str) -> list[Kernel]:
    """Returns the kernels of the one profile that `jax.profiler` left in a folder."""
    from jax.profiler import ProfileData

    (path,) = Path(folder).rglob("*.xplane.pb")
    found = []
    for plane in ProfileData.from_file(str(path)).planes:
        if not plane.name.startswith("/device:"):
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue  # the other lines say the same again by module, step and operation
            for event in line.events:
                operation = str(dict(event.stats).get("hlo_op", ""))
                span = float(event.duration_ns), float(event.start_ns)
                found.append(Kernel(event.name, operation, *span))
    return found


def gaps(kernels: Sequence[Kernel]) -> list[tuple[float, str]]:
    """Returns how long nothing ran between kernels, in nanoseconds, and what came then."""
    spans = [(k.begin, k.begin + k.duration, k.name) for k in kernels if k.begin is not None]
    found, over = [], min(spans, default=(0.0,))[0]
    for begin, end, name in sorted(spans):
        if begin > over:
            found.append((begin - over, name))
        over = max(over, end)
    return found


def summary(kernels: Sequence[Kernel], steps: int) -> str:
    """Returns milliseconds and launches a step by kernel and by kind, the longest first."""
    spent: defaultdict[str, float] = defaultdict(float)
    launches: Counter[str] = Counter()
    operations: defaultdict[str, Counter[str]] = defaultdict(Counter)
    kinds: defaultdict[str, float] = defaultdict(float)
    waits: defaultdict[str, list[float]] = defaultdict(list)
    for name, operation, nanoseconds, _ in kernels:
        spent[name] += nanoseconds
        launches[name] += 1
        operations[name][operation] += 1
        kinds[re.sub(r"[\d_.]+$", "", name)] += nanoseconds
    idle = gaps(kernels)
    for nanoseconds, name in idle:
        if nanoseconds >= LEAST_GAP:
            waits[name].append(nanoseconds)
    scale = 1e-6 / steps
    total, nothing = sum(spent.values()), sum(nanoseconds for nanoseconds, _ in idle)
    lines = [
        f"{total * scale:.2f} ms of kernels a step, {len(kernels) // steps} launches; "
        f"{nothing * scale:.2f} ms without any",
        "",
    ]
    lines += [f"the {TOP} longest by name: ms, launches, name (operations of XLA's)"]
    for name, nanoseconds in sorted(spent.items(), key=lambda item: -item[1])[:TOP]:
        ops = ", ".join(op for op, _ in operations[name].most_common(3) if op)
        count = launches[name] / steps
        lines.append(f"{nanoseconds * scale:9.3f} {count:8.1f}  {name[:110]} ({ops})")
    lines += ["", f"the {TOP} longest kinds: ms, name without its number"]
    for kind, nanoseconds in sorted(kinds.items(), key=lambda item: -item[1])[:TOP]:
        lines.append(f"{nanoseconds * scale:9.3f}  {kind[:110]}")
    lines += ["", f"nothing ran for {LEAST_GAP / 1e3:.0f} us or more: ms, how often, before what"]
    for name, each in sorted(waits.items(), key=lambda item: -sum(item[1]))[:TOP]:
        lines.append(f"{sum(each) * scale:9.3f} {len(each) / steps:8.1f}  {name[:110]}")
    return "\n".join(lines) + "\n"
