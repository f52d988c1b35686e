"""How XLA compiles for the CPU while the tests run: sooner, or as users have it.

Compiling is most of what the tests do. Without LLVM's optimisation and without the emitters that
build a fusion with MLIR it takes a third of the time. With `DSJAX_TEST_OPTIMISED=1` everything is
compiled as users have it: so run the leg on the newest Python, and `scripts/test --all`.
"""

import atexit
import os
import shutil
import tempfile

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


def share_programs() -> None:
    """Makes the folder in which the processes of this run find what one of them has compiled.

    The folder is new and goes with the run: a test must not see another run's programs. The workers
    and the processes that tests start inherit it.
    """
    if "DSJAX_TEST_PROGRAMS" not in os.environ:
        folder = tempfile.mkdtemp(prefix="dsjax-programs-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ["DSJAX_TEST_PROGRAMS"] = folder
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "true"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["DSJAX_TEST_PROGRAMS"]
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
