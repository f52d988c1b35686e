"""How XLA compiles for the CPU while the tests run: sooner, or as users have it.

Compiling is most of what the tests do. Without LLVM's optimisation and without the emitters that
build a fusion with MLIR it takes a third of the time. With `DSJAX_TEST_OPTIMISED=1` everything is
compiled as users have it: so run the leg on the newest Python, and `scripts/test --all`.
"""

import os

_SOON = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters,"
    "xla_cpu_disable_loop_unrolling,xla_cpu_disable_slp_vectorizer",
)


def xla_flags(num_devices: int) -> str:
    """Returns XLA_FLAGS for a process of so many CPU devices."""
    optimised = os.environ.get("DSJAX_TEST_OPTIMISED", "0") == "1"
    return " ".join(
        [
            f"--xla_force_host_platform_device_count={num_devices}",
            *(() if optimised else _SOON),
        ]
    )
