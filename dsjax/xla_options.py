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
# Of decode steps that have every layer by itself. XLA joins two products of the same rows and, in
# each step, writes their weights out side by side first: 4 % of a step of 256 rows of V2-Lite on an
# H100. With its own Triton products to choose from beside cuBLAS's, such a step takes 85 s to
# compile there instead of 17, and as long to run.
_NOT_JOINED: dict[str, bool | int] = {
    "xla_gpu_dot_merger_threshold_mb": 0,
    "xla_gpu_enable_triton_gemm": False,
}
# Such a step is one CUDA graph. By default its kernels run one after the other; with edges only
# where one needs what another wrote, a step of V2-Lite took 2.86 ms instead of 3.33 (1 row), 9.14
# instead of 9.67 (32) and 10.54 instead of 11.07 (128) on an H200, its logits bit for bit the same.
_UNROLLED: dict[str, dict[str, bool | int | str]] = {
    "gpu": {**_NOT_JOINED, "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"},
}
# Of other programs that generate, whose layers are a loop. XLA fuses what takes a layer's weights
# and pages out of those of all layers into cuBLAS's and our kernels' calls; the host then waits for
# the place, or gigabytes are copied in every layer: a step with 2,048 tokens of a prompt and 256
# that decode took 89.9 ms on an H200, and 33.8 without.
_LOOPED: dict[str, dict[str, bool | int | str]] = {
    "gpu": {**_NOT_JOINED, "xla_gpu_enable_dynamic_slice_fusion": False},
}
# Of others that multiply quantised weights, by XLA's products. Without it XLA writes such weights
# out widened before each product of more than one row: for 4-bit numbers some five times the bytes
# (seen in programs compiled for an H100).
_QUANTISED: dict[str, dict[str, bool | int | str]] = {
    "gpu": {
        "xla_gpu_experimental_enable_subchannel_dequantisation_fusion": True,
    },
}


def compiler_options(platform: str) -> dict[str, str]:
    """Returns the options of a training step's program for a platform ("cpu", "gpu", "tpu")."""
    return _not_named_by_user(_OPTIONS.get(platform, {}))


def inference_options(
    platform: str, *, quantised: bool, unrolled: bool = False
) -> dict[str, bool | int | str]:
    """Returns the options of a program that generates.

    Args:
        platform: "cpu", "gpu" or "tpu".
        quantised: whether it multiplies quantised weights.
        unrolled: whether it is a decode step that has every layer by itself.
    """
    options = _UNROLLED if unrolled else _QUANTISED if quantised else _LOOPED
    return _not_named_by_user(options.get(platform, {}))


def _not_named_by_user[T](options: dict[str, T]) -> dict[str, T]:
    flags = f"{os.environ.get('XLA_FLAGS', '')} {os.environ.get('LIBTPU_INIT_ARGS', '')}"
    named = set(re.findall(r"--(\w+)", flags))
    return {name: value for name, value in options.items() if name not in named}
