"""What a plan assumes of the chips: every figure and its source, in one table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import jax

from dsjax.chips import peak_flops


@dataclass(frozen=True)
class ChipRates:
    """Rates of one device as JAX counts devices.

    Attributes:
        hbm_bytes_per_second: of its memory.
        capacity_bytes: memory that libtpu lets a program have.
        link_bytes_per_second: one way over one link of the torus.
        wrap: chips along a torus dim from which on its ends are joined.
        dcn_bytes_per_second: one way between slices, a device's share of its host's.
    """

    hbm_bytes_per_second: float
    capacity_bytes: int
    link_bytes_per_second: float
    wrap: int
    dcn_bytes_per_second: float


def _gib(size: float) -> int:
    return int(size * 2**30)


SOURCES = {
    "flops_per_second": "dense bfloat16, the vendor's data sheet",
    "hbm_bytes_per_second": "cloud.google.com/tpu/docs, the page of each version",
    "capacity_bytes": "what libtpu 0.0.48.1 names when a program does not fit",
    "link_bytes_per_second": "How to Scale Your Model (Google DeepMind, 2025), part 2, one way a "
    "link; 7x: its data sheet, 1,200 GB/s both ways over six links a chip, halved for its two "
    "devices",
    "wrap": "the same, part 2: v5e and v6e wrap at 16 chips, the others along dims of 4 and more",
    "dcn_bytes_per_second": "the same, part 2, a device's share; 7x: taken as v6e's",
}
# FLOP/s: `dsjax.chips`.
RATES = {
    "TPU v5 lite": ChipRates(819e9, _gib(15.75), 45e9, 16, 3.125e9),
    "TPU v5": ChipRates(2765e9, _gib(95.73), 90e9, 4, 6.25e9),
    "TPU v6 lite": ChipRates(1640e9, _gib(31.24), 90e9, 16, 12.5e9),
    "TPU7x": ChipRates(3690e9, _gib(94.74), 50e9, 4, 12.5e9),
}


@dataclass(frozen=True)
class Pod:
    """The chips of a plan.

    Attributes:
        devices: in the mesh's order.
        rates: of one.
        flops_per_second: dense bfloat16, of one.
    """

    devices: tuple[jax.Device, ...]
    rates: ChipRates
    flops_per_second: float

    @classmethod
    def of(cls, devices: Iterable[jax.Device]) -> Pod:
        """Looks the devices' rates up.

        Raises:
            ValueError: nothing is known of them.
        """
        found = tuple(devices)
        kind, peak = found[0].device_kind, peak_flops(found[0])
        if kind not in RATES or peak is None:
            raise ValueError(f"a plan knows no rates of {kind!r}; it knows {', '.join(RATES)}")
        return cls(found, RATES[kind], peak)

    def assumptions(self) -> dict[str, dict[str, float | str]]:
        """Every figure that the modelled time rests on, with its source."""
        figures = {"flops_per_second": self.flops_per_second, **vars(self.rates)}
        return {name: {"value": value, "source": SOURCES[name]} for name, value in figures.items()}

    def send_seconds(self, num_bytes: float, group: tuple[int, ...]) -> float:
        """The time in which each chip of a group sends so many bytes, links evenly used.

        A group that spans slices is held to DCN. Within one it has, for each torus dim along which
        its chips differ, one link, or two where it takes all of a dim whose ends are joined.
        """
        if not num_bytes:
            return 0.0
        chips = [self.devices[number] for number in group] or list(self.devices)
        if len({getattr(chip, "slice_index", 0) for chip in chips}) > 1:
            return num_bytes / self.rates.dcn_bytes_per_second
        links = 0
        for dim in range(3):
            taken = {_coords(chip)[dim] for chip in chips}
            if len(taken) > 1:
                whole = len(taken) == len({_coords(chip)[dim] for chip in self.devices})
                links += 2 if whole and len(taken) >= self.rates.wrap else 1
        return num_bytes / (max(links, 1) * self.rates.link_bytes_per_second)


def _coords(device: jax.Device) -> tuple[int, ...]:
    coords: tuple[int, ...] = device.coords
    return (*coords, 0, 0, 0)[:3]
