"""The chips that kernels are written for: their names, and what tile sizes depend on."""

import dataclasses

import jax

# Numbers in a row of a TPU's registers and of its memory.
TPU_LANES = 128
# Streaming multiprocessors of H100 SXM and H200: what a host without a GPU compiles for.
HOPPER_SMS = 132


@dataclasses.dataclass(frozen=True)
class TpuChip:
    """What the tile sizes of TPU kernels depend on.

    Attributes:
        vmem_mib: VMEM of a core.
        wide: whether the matrix units are 256 wide and deep, not 128.
        cores: cores that share a kernel's grid.
    """

    vmem_mib: int
    wide: bool
    cores: int

    @property
    def vmem_limit(self) -> int:
        """Bytes of VMEM that a kernel may take."""
        return (self.vmem_mib - 4) * 2**20


# The generations that every TPU kernel is compiled for in the tests.
TPU_CHIPS = {
    "v5e": TpuChip(vmem_mib=128, wide=False, cores=1),
    "v5p": TpuChip(vmem_mib=64, wide=False, cores=2),
    "v6e": TpuChip(vmem_mib=128, wide=True, cores=1),
    "7x": TpuChip(vmem_mib=64, wide=True, cores=1),
}
TPU_NAMES = ("v4", *TPU_CHIPS, "tpu")  # The last stands for one that is not known.
# Sizes that fit all of them.
ANY_TPU = TpuChip(vmem_mib=64, wide=True, cores=2)

# How jax's name of a device begins. The longest that fits decides: "TPU v5 lite" is no "TPU v5".
_KINDS = {
    "TPU": "tpu",
    "TPU v4": "v4",
    "TPU v5": "v5p",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "7x",
    "NVIDIA H100": "hopper",
    "NVIDIA H200": "hopper",
}
_GPU_PLATFORMS = ("gpu", "cuda", "rocm")


def chip_of(platform: str, device_kind: str) -> str:
    """Names the chip of a device, which may be one that a host only compiles for.

    Args:
        platform: a jax device's, such as "tpu".
        device_kind: a jax device's, such as "TPU v5 lite".

    Returns:
        "v4", "v5e", "v5p", "v6e" or "7x"; "tpu" for another TPU; "hopper" for H100 and H200; "gpu"
        for another GPU; else the platform, such as "cpu".
    """
    found = [name for name in _KINDS if device_kind.startswith(name)]
    if found:
        return _KINDS[max(found, key=len)]
    return "gpu" if platform in _GPU_PLATFORMS else platform


def tpu_chip() -> TpuChip:
    """The TPU that is compiled for, which need not be here: the mesh in use knows.

    Without a mesh it is the default device's. For a device that is no known TPU, the sizes that
    fit all.
    """
    target = jax.sharding.get_abstract_mesh().abstract_device
    kind = jax.devices()[0].device_kind if target is None else target.device_kind
    return TPU_CHIPS.get(chip_of("", kind), ANY_TPU)


def num_sms() -> int:
    """Streaming multiprocessors of the GPU, or of an H200 on a host without one."""
    device = jax.devices()[0]
    return device.core_count if device.platform == "gpu" else HOPPER_SMS
