"""Peak rates of the chips that figures are given as a share of."""

from __future__ import annotations

import jax

# Dense bf16 FLOP/s of one device as JAX counts devices, from the vendors' data sheets (NVIDIA's
# give twice as much, with sparsity), by JAX's whole name of the device. A suffix is another chip:
# PCIe and NVL cards have fewer watts and multiprocessors, MIG is a part of a card.
_PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,  # a chip is two devices
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,  # SXM
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,  # SXM
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA GH200 480GB": 989e12,
    "NVIDIA GH200 144G HBM3e": 989e12,
}


def peak_flops(device: jax.Device) -> float | None:
    """Returns a device's dense bf16 FLOP/s, or None where it is not known: then there is no MFU."""
    return _PEAK_FLOPS.get(device.device_kind)
