"""Tile sizes of absorbed decode, measured by `scripts/tune_mla_decode.py`, by chip."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class HopperTiles:
    """Sizes of the Hopper kernel.

    Attributes:
        num_sms: streaming multiprocessors of the chip: one thread block runs on each.
        merge_rows: query rows that a thread block of the merge kernel takes, where there are many.
        merge_pieces: partial results that it loads at a time.
    """

    num_sms: int = 132
    merge_rows: int = 8
    merge_pieces: int = 8


# The SXM parts of both have 132 multiprocessors.
HOPPER_TILES = {"NVIDIA H100": HopperTiles(), "NVIDIA H200": HopperTiles()}


def hopper_tiles(chip: str = "NVIDIA H200") -> HopperTiles:
    """Returns the sizes measured on a chip, by how JAX's name of it begins."""
    for name, tiles in HOPPER_TILES.items():
        if chip.startswith(name):
            return tiles
    raise ValueError(f"chip is {chip!r}; there are tiles for {tuple(HOPPER_TILES)}")
