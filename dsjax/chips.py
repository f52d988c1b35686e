"""Peak rates of the chips that figures are given as a share of."""

from __future__ import annotations

import jax

# Dense bf16 FLOP/s of one device as JAX counts devices, from the vendors' data sheets.
_PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,  # a chip is two devices
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device: jax.Device) -> float | None:
    """Returns a device's dense bf16 FLOP/s, or None where it is not known.

    The longest name that begins the device's kind decides, so "TPU v5 lite" is not a "TPU v5".
    """
    names = [name for name in _PEAK_FLOPS if device.device_kind.startswith(name)]
    return _PEAK_FLOPS[max(names, key=len)] if names else None
