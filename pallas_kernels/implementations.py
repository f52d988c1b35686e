"""The implementations of an op: their names, the choice of one, and why one is refused."""

import importlib
from collections.abc import Iterable, Sequence
from types import ModuleType

import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from pallas_kernels.chips import TPU_NAMES

# What an op can have: its meaning, a portable form, and Pallas kernels for TPUs and for Hopper.
IMPLEMENTATIONS = ("reference", "xla", "tpu", "hopper")

# The chips that the kernels are for; the other implementations run everywhere.
_CHIPS = {"tpu": TPU_NAMES, "hopper": ("hopper",)}


def check_choice(argument: str, value: str, choices: Iterable[str]) -> None:
    """Raises a ValueError unless an argument is one of the choices."""
    if value not in choices:
        raise ValueError(f"{argument}: {value!r} must be one of {tuple(choices)}")


def load(op: str, implementation: str) -> ModuleType:
    """Imports the module of an implementation.

    It is imported when it is chosen, so a host needs no other chip's compiler.

    Args:
        op: the op's package.
        implementation: a name that was checked.
    """
    return importlib.import_module(f"{op}.{implementation}")


def check_supported(
    implementation: str, reason: str | None, *, argument: str = "implementation"
) -> None:
    """Raises a ValueError where an op's `supported` gives a reason."""
    if reason is not None:
        raise ValueError(f"{argument}: {implementation!r} does not take this: {reason}")


# What `supported` is made of. Each gives one line that names what is to blame, or None.


def first_reason(*reasons: str | None) -> str | None:
    """The first reason that there is."""
    return next((reason for reason in reasons if reason is not None), None)


def wrong_chip(implementation: str, chip: str | None) -> str | None:
    """The chip must be one that the implementation is for; None stands for such a chip."""
    chips = _CHIPS.get(implementation)
    if chip is None or chips is None or chip in chips:
        return None
    return f"chip {chip!r} must be {_listed(repr(name) for name in chips)}"


def wrong_dtype(name: str, dtype: DTypeLike, dtypes: Sequence[DTypeLike]) -> str | None:
    """The dtype must be one of some."""
    if jnp.dtype(dtype) in [jnp.dtype(choice) for choice in dtypes]:
        return None
    return f"{name} {jnp.dtype(dtype)} must be {_listed(str(jnp.dtype(d)) for d in dtypes)}"


def not_multiple(name: str, size: int, step: int) -> str | None:
    """The size must be a multiple of a step."""
    return None if size % step == 0 else f"{name} {size} must be a multiple of {step}"


def not_equal(name: str, size: int, wanted: int) -> str | None:
    """The size must be this one."""
    return None if size == wanted else f"{name} {size} must be {wanted}"


def too_large(name: str, size: int, most: int) -> str | None:
    """The size must not exceed a bound."""
    return None if size <= most else f"{name} {size} must be at most {most}"


def too_small(name: str, size: int, least: int) -> str | None:
    """The size must reach a bound."""
    return None if size >= least else f"{name} {size} must be at least {least}"


def _listed(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def keep(array: Array, name: str, implementation: str) -> Array:
    """Names a kernel's result that the backward pass keeps, for policies of jax.checkpoint.

    XLA writes what a scan keeps of a GPU's kernel by a second run of that kernel, unless something
    stands between the result and what is kept: seen with `xla_gpu_enable_dynamic_slice_fusion`.
    """
    if implementation == "hopper":
        array = lax.optimization_barrier(array)
    return checkpoint_name(array, name)
