"""What we ask of XLA's compiler beyond its defaults, by platform: the one place.

An option goes in with what it was measured to do. A user's own flags win: what `XLA_FLAGS` (or, for
TPUs, `LIBTPU_INIT_ARGS`) names is left out, since options of one program go before those flags.
"""

from __future__ import annotations

import os
import re

_OPTIONS: dict[str, dict[str, str]] = {
    # Without it libtpu's ragged all-to-all stands still while products could run beside it.
    "tpu": {"xla_tpu_enable_async_ragged_all_to_all": "true"},
}
# Of programs that multiply quantised weights. Without it XLA writes such weights out widened before
# each product of more than one row: for 4-bit numbers some five times the bytes (seen in programs
# compiled for an H100).
_QUANTISED: dict[str, dict[str, bool]] = {
    "gpu": {"xla_gpu_experimental_enable_subchannel_dequantisation_fusion": True},
}


def compiler_options(platform: str) -> dict[str, str]:
    """Returns the options of a training step's program for a platform ("cpu", "gpu", "tpu")."""
    return _not_named_by_user(_OPTIONS.get(platform, {}))


def quantised_options(platform: str) -> dict[str, bool]:
    """Returns the options of a program that multiplies quantised weights."""
    return _not_named_by_user(_QUANTISED.get(platform, {}))


def _not_named_by_user[T](options: dict[str, T]) -> dict[str, T]:
    flags = f"{os.environ.get('XLA_FLAGS', '')} {os.environ.get('LIBTPU_INIT_ARGS', '')}"
    named = set(re.findall(r"--(\w+)", flags))
    return {name: value for name, value in options.items() if name not in named}
