# ruff: noqa: E402
"""What every test runs under: eight CPU devices, and the kernels' annotations checked.

`DSJAX_TEST_PLATFORM=gpu` (or tpu) runs on that platform instead; the tests that need eight devices
or a CPU are then skipped where there are none.
"""

import gc
import importlib.util
import os
from collections.abc import Generator, Iterator
from pathlib import Path

from tests import cpu_compiler

PLATFORM = os.environ.get("DSJAX_TEST_PLATFORM", "cpu")

# All of this must be in place before jax is imported, which is why it stands above the imports.
if PLATFORM == "cpu":
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = cpu_compiler.xla_flags(num_devices=8)
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # compiling anew takes no longer
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for the network is a broken test
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jaxtyping
import numpy as np
import pytest

from tests import annotations, tpu_compiler

# Public functions of the kernels are annotated with shapes and dtypes: check them at run time.
jaxtyping.install_import_hook("pallas_kernels", f"{annotations.__name__}.check")

import jax

from dsjax.engine.compiled import forget_programs


def pytest_configure() -> None:
    """Fails early where the environment is not the one that the tests are written for."""
    if PLATFORM == "cpu" and jax.device_count() != 8:
        raise pytest.UsageError(f"the tests need 8 CPU devices, jax has {jax.devices()}")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the long tests first; skips those that need an NVIDIA GPU where there is none."""
    # A long test that begins last runs alone. Each part keeps its order, and so its fixtures.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if any(device.platform == "gpu" for device in jax.devices()):
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


# Each program that XLA compiles for the CPU keeps several parts of memory mapped. Linux gives a
# process 65,530 of them, and one that wants more ends without a word, as half of the tests would.
MOST_MAPPINGS = 20_000


@pytest.fixture(autouse=True, scope="module")
def _forget_programs() -> Iterator[None]:
    """Lets go of compiled programs where they have become many."""
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and len(mappings.read_bytes().splitlines()) > MOST_MAPPINGS:
        jax.clear_caches()
        forget_programs()
        gc.collect()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Notes which programs a test compiled because there was no record of them."""
    report = yield
    report.user_properties += [("compiled", name) for name in tpu_compiler.take_compiled()]
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Lists these programs: they are what made the run long."""
    compiled = {
        value
        for reports in terminalreporter.stats.values()
        for report in reports
        for name, value in getattr(report, "user_properties", ())
        if name == "compiled"
    }
    if compiled:
        terminalreporter.section("compiled without a record")
        terminalreporter.line(f"To record what became of these: {tpu_compiler.RENEW}")
        for name in sorted(compiled):
            terminalreporter.line(name)


def require_module(name: str) -> None:
    """Skips a test whose optional package is missing; in CI, where all are installed, fails it."""
    if importlib.util.find_spec(name) is None:
        if os.environ.get("CI"):
            pytest.fail(f"CI must have {name} installed")
        pytest.skip(f"needs {name}")


@pytest.fixture
def unchecked_annotations() -> Iterator[None]:
    """No annotation is checked: for tests of our own messages, which the checks would forestall."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture
def rng() -> np.random.Generator:
    """A seeded generator, the same for every test."""
    return np.random.default_rng(0)


@pytest.fixture
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parent.parent
