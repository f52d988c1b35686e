"""Compiled programs of all engines of this process, so that a second engine compiles nothing."""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from dsjax.engine.program_store import program_name, store_folder, stored_program
from dsjax.xla_options import inference_options

_MAX_PROGRAMS = 256
_QUANTISED_DTYPES = tuple(map(jnp.dtype, (jnp.int8, jnp.int4, jnp.uint4, jnp.float8_e4m3fn)))
_programs: OrderedDict[Hashable, Any] = OrderedDict()
_lock = threading.Lock()


def compiled(
    function: Callable[..., Any],
    static: tuple[Hashable, ...],
    arguments: tuple[Any, ...],
    donated: tuple[int, ...],
    out_sharding: Any,
    *,
    quantised: bool = False,
    unrolled: bool = False,
    spelling: str | None = None,
) -> Any:
    """Returns a compiled program, which takes arrays of these shapes and nothing else.

    Args:
        function: takes `static`, then arrays.
        static: its first arguments.
        arguments: its other arguments: arrays, or `jax.ShapeDtypeStruct` with shardings.
        donated: places among `arguments` whose arrays are overwritten.
        out_sharding: of all results, or a tuple of them.
        quantised: whether it multiplies quantised weights.
        unrolled: whether it is a decode step that has every layer by itself.
        spelling: says what `static` is, alike in every process: such a program may be kept on disk
            (see `program_store`).
    """
    leaves, treedef = jax.tree.flatten(arguments)
    shapes = tuple((leaf.shape, jnp.dtype(leaf.dtype), leaf.sharding) for leaf in leaves)
    key = (function, static, treedef, shapes, donated, out_sharding, quantised, unrolled)
    with _lock:
        if key in _programs:
            _programs.move_to_end(key)
            return _programs[key]
    run = functools.partial(function, *static)
    jitted = jax.jit(run, donate_argnums=donated, out_shardings=out_sharding)
    devices = sorted(jax.tree.leaves(out_sharding)[0].device_set, key=lambda device: device.id)
    platform = devices[0].platform
    options = inference_options(platform, quantised=quantised, unrolled=unrolled)

    def make() -> Any:
        return jitted.lower(*arguments).compile(compiler_options=options or None)

    folder = store_folder()
    if folder is None or spelling is None:
        program = make()
    else:
        described = (function.__qualname__, spelling, str(treedef), *map(str, shapes))
        described += (str(donated), str(out_sharding), str(options))
        program = stored_program(folder, program_name(described, devices), devices, make)
    with _lock:
        _programs[key] = program
        while len(_programs) > _MAX_PROGRAMS:
            _programs.popitem(last=False)
    return program


def are_quantised(weights: Iterable[Any]) -> bool:
    """Returns whether there are arrays of few bits among a model's."""
    return any(weight.dtype in _QUANTISED_DTYPES for weight in weights)


def forget_programs() -> None:
    """Lets go of all compiled programs; engines that run keep theirs."""
    with _lock:
        _programs.clear()
