"""What each transport of the exchange takes."""

from pallas_kernels.implementations import (
    check_choice,
    first_reason,
    not_multiple,
    too_large,
    too_small,
)

# "ragged" sends the rows that there are, "ragged_parts" the same in many pieces, "fixed" as many as
# there might be.
TRANSPORTS = ("ragged", "ragged_parts", "fixed")


def supported(
    transport: str, *, num_experts: int, num_shards: int, max_shards: int, chip: str | None = None
) -> str | None:
    """Says whether a transport takes these sizes.

    Args:
        transport: one of TRANSPORTS.
        num_experts: experts on all shards.
        num_shards: P, shards of the experts.
        max_shards: F, a bound on the shards that any token goes to.
        chip: the chip to run on, as `chips.chip_of` names it; None for one that fits.

    Returns:
        None, or one line that names what is to blame.

    Raises:
        ValueError: an unknown transport.
    """
    check_choice("transport", transport, TRANSPORTS)
    # XLA's CPU backend has no ragged exchange.
    lacks_ragged = chip == "cpu" and transport != "fixed"
    return first_reason(
        "chip 'cpu' must be a TPU or a GPU" if lacks_ragged else None,
        not_multiple("num_experts", num_experts, num_shards),
        too_large("max_shards", max_shards, num_shards),
        too_small("max_shards", max_shards, 1),
    )
