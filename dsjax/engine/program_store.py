"""Compiled programs on disk, so that a second start neither traces nor compiles.

JAX's own cache spares the compiling alone: lowering our kernels for Hopper takes some ten seconds a
program, one program after the other. The programs lie beside that cache, where one is asked for
(`JAX_COMPILATION_CACHE_DIR`), and like it they are trusted: whoever writes there runs code here.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import logging
import os
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable

from dsjax.files import write_bytes

_LOG = logging.getLogger(__name__)
_PACKAGES = ("dsjax", "pallas_kernels")
_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")


def store_folder() -> Path | None:
    """Returns where programs are kept, or None where JAX's cache is off or in several processes."""
    folder = jax.config.jax_compilation_cache_dir
    if not folder or not jax.config.jax_enable_compilation_cache or jax.process_count() > 1:
        return None
    return Path(folder) / "dsjax-programs"


def program_name(described: Sequence[str], devices: Sequence[Any]) -> str:
    """Returns the name of a program: a hash of all that it depends on.

    Args:
        described: function, static arguments, arrays, options, each spelled alike in every process.
        devices: that it runs on.
    """
    client = devices[0].client
    parts = [
        jax.__version__,
        importlib.metadata.version("jaxlib"),
        client.platform_version,
        *(f"{device.id} {device.device_kind}" for device in devices),
        *(f"{name}={os.environ.get(name, '')}" for name in _VARIABLES),
        f"{jax.config.jax_default_matmul_precision} {jax.config.jax_enable_x64}",
        source_digest(),
        *described,
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@functools.cache
def source_digest() -> str:
    """Returns a hash of all code of ours that a program may come from."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[2]
    for package in _PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def stored_program(folder: Path, name: str, devices: Sequence[Any], make: Callable[[], Any]) -> Any:
    """Returns a program that was kept, or makes and keeps it."""
    program = read_program(folder, name, devices)
    if program is None:
        program = make()
        keep_program(folder, name, program)
    return program


def read_program(folder: Path, name: str, devices: Sequence[Any]) -> Any | None:
    """Returns a program that was kept, or None; a damaged file is said and passed over."""
    path = folder / name
    if devices[0].platform == "gpu":
        # It says where the library lies that our kernels' host code calls; lowering them does the
        # same, but whoever finds a program here lowers none.
        importlib.import_module("jax.experimental.pallas.mosaic_gpu")
    try:
        stored = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        digest, content = stored[:32], stored[32:]
        if hashlib.sha256(content).digest() != digest:
            raise ValueError("its checksum does not hold")
        payload, in_tree, out_tree = pickle.loads(content)
        return serialize_executable.deserialize_and_load(
            payload, in_tree, out_tree, devices[0].client, devices
        )
    except Exception as error:  # whatever a damaged or foreign file makes of itself
        _LOG.warning("engine: the stored program %s is not used: %s", path, error)
        return None


def keep_program(folder: Path, name: str, program: Any) -> None:
    """Keeps a compiled program; where that fails, says why and goes on without."""
    try:
        content = pickle.dumps(serialize_executable.serialize(program))
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / name, hashlib.sha256(content).digest() + content)
    except Exception as error:
        _LOG.warning("engine: the program %s is not kept: %s", folder / name, error)
