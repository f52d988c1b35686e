"""What every kernel simulated on the CPU is held to."""

import jax
from jax._src.pallas.mosaic.interpret import interpret_pallas_call


def without_races[T](result: T) -> T:
    """Waits for a simulated kernel and fails if it raced: the simulator itself only says so."""
    result = jax.block_until_ready(result)
    races = interpret_pallas_call.races
    assert races is not None
    assert not races.races_found
    return result
