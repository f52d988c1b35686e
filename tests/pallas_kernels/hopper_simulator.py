"""Runs the bodies of Mosaic GPU kernels on NumPy arrays, a thread for each warpgroup.

What is checked: indices, masks, the order of the products' operands, that barriers are arrived at
as often as they are waited for and never pass a waiter by, that shared memory (poisoned with NaN)
is written before it is read, and that sums in device memory come in the order of the key blocks.
What is not: anything asynchronous within a thread, layouts, and the compiler. Blocks run one after
another.
"""

import functools
import threading
from collections.abc import Callable, Iterable
from types import ModuleType, SimpleNamespace
from typing import Any, Self

import jax
import numpy as np
import pytest

WAIT_S = 60
_thread = threading.local()


class Ref:
    """A view of an array with the interface of a Pallas reference."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.at = self

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def __getitem__(self, index: Any) -> Any:
        if index is Ellipsis:
            return self.array.copy()
        view = self.array[index]
        if view.ndim == 0:
            whole = np.issubdtype(view.dtype, np.integer)
            return Scalar(self.array, index) if whole else view[()]
        return Ref(view)

    def __setitem__(self, index: Any, value: np.ndarray) -> None:
        target = self.array[index]
        assert target.shape == value.shape, (target.shape, value.shape)
        assert target.dtype == value.dtype, (target.dtype, value.dtype)
        self.array[index] = value

    def transpose(self, axes: tuple[int, ...]) -> "Ref":
        return Ref(self.array.transpose(axes))


class Scalar(np.int32):
    """A number read from a reference, which still knows where it stands."""

    array: np.ndarray
    index: Any

    def __new__(cls, array: np.ndarray, index: Any) -> Self:
        number = super().__new__(cls, array[index])
        number.array, number.index = array, index
        return number


class Accumulator:
    """The registers of a product."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.value = np.zeros(shape, np.float32)

    def __getitem__(self, index: Any) -> np.ndarray:
        assert index is Ellipsis
        return self.value.copy()

    def __setitem__(self, index: Any, value: np.ndarray) -> None:
        assert index is Ellipsis
        self.value = value.astype(np.float32)


class Barriers:
    """Barriers that count arrivals; each thread waits for one phase after the other."""

    def __init__(self, num_arrivals: int, num_barriers: int) -> None:
        self.num_arrivals = num_arrivals
        self.arrived, self.phases = [0] * num_barriers, [0] * num_barriers
        self.waited: dict[tuple[int, int], int] = {}
        self.condition = threading.Condition()
        self.at = self

    def __getitem__(self, index: Any) -> tuple["Barriers", int]:
        return self, int(index)

    def arrive(self, index: int) -> None:
        with self.condition:
            self.arrived[index] += 1
            if self.arrived[index] == self.num_arrivals:
                self.arrived[index] = 0
                self.phases[index] += 1
                self.condition.notify_all()

    def wait(self, index: int) -> None:
        key = (threading.get_ident(), index)
        with self.condition:
            number = self.waited.get(key, 0)
            ready = self.condition.wait_for(lambda: self.phases[index] > number, WAIT_S)
            assert ready, "a barrier is never arrived at: deadlock"
            # The hardware knows a phase's parity only.
            assert self.phases[index] == number + 1, "a barrier has passed a waiting thread by"
            self.waited[key] = number + 1


def _barrier(ref: Barriers | tuple[Barriers, int]) -> tuple[Barriers, int]:
    return ref if isinstance(ref, tuple) else (ref, 0)


def _array(value: Ref | np.ndarray) -> np.ndarray:
    return value.array if isinstance(value, Ref) else value


def _copy(source: Ref, target: Ref, *, reduction_op: str | None = None) -> None:
    assert source.shape == target.shape, (source.shape, target.shape)
    assert source.array.dtype == target.array.dtype
    if reduction_op is None:
        target.array[...] = source.array
    else:
        assert reduction_op == "add"
        target.array[...] += source.array


def _spawn(calls: Iterable[tuple[dict[str, Any], Callable[[], object]]]) -> None:
    """Runs functions in threads of their own and raises what any of them raises."""
    errors: list[BaseException] = []
    context = dict(_thread.__dict__)

    def run(axes: dict[str, Any], function: Callable[[], object]) -> None:
        _thread.__dict__.update(context | axes)
        try:
            with np.errstate(all="ignore"):
                function()
        except BaseException as error:  # Raised again by the caller.
            errors.append(error)

    threads = [threading.Thread(target=run, args=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


class _Spec(SimpleNamespace):
    def make(self) -> Any:
        if self.kind == "barrier":
            return Barriers(self.num_arrivals, self.num_barriers)
        if self.kind == "acc":
            return Accumulator(self.shape)
        if self.kind == "union":  # views in which the same places have the same numbers
            return (self.specs[0].make(),) * len(self.specs)
        array = np.empty(self.shape, self.dtype)
        array.fill(-7 if np.issubdtype(array.dtype, np.integer) else np.nan)
        return Ref(array)


def _smem(shape: tuple[int, ...], dtype: Any, **_: object) -> _Spec:
    return _Spec(kind="smem", shape=shape, dtype=dtype)


def _iota(dtype: Any, shape: tuple[int, ...], dim: int, layout: object) -> np.ndarray:
    del layout
    numbers = np.arange(shape[dim], dtype=dtype)
    return np.broadcast_to(numbers[:, None] if dim == 0 else numbers, shape)


def _when(condition: Any) -> Callable[[Callable[[], object]], object]:
    return lambda function: function() if condition else None


def _loop(start: Any, stop: Any) -> Callable[[Callable[[np.int32], object]], None]:
    def run(body: Callable[[np.int32], object]) -> None:
        for step in range(int(start), int(stop)):
            body(np.int32(step))

    return run


def _fori_loop[T](start: Any, stop: Any, body: Callable[[np.int32, T], T], carry: T) -> T:
    for step in range(int(start), int(stop)):
        carry = body(np.int32(step), carry)
    return carry


def _wgmma(acc: Accumulator, a: Ref | np.ndarray, b: Ref | np.ndarray) -> None:
    product = _array(a).astype(np.float32) @ _array(b).astype(np.float32)
    assert acc.value.shape == product.shape
    acc.value = acc.value + product


def _fill(source: Ref, target: Ref) -> None:
    """Copies a window as TMA does: what lies beyond the array's end is 0."""
    assert all(np.less_equal(source.shape, target.shape)), (source.shape, target.shape)
    assert source.array.dtype == target.array.dtype
    target.array[...] = 0
    target.array[tuple(map(slice, source.shape))] = source.array


def _copy_in(
    source: Ref,
    target: Ref,
    barrier: Barriers | tuple[Barriers, int],
    copy: Callable[[Ref, Ref], None] = _copy,
) -> None:
    copy(source, target)
    barriers, index = _barrier(barrier)
    barriers.arrive(index)


def _wait_semaphore(
    semaphore: Scalar, value: Any, *, decrement: object, memory_scope: object
) -> None:
    del decrement, memory_scope
    assert semaphore.array[semaphore.index] == value, "a sum comes out of its turn"


def _signal_semaphore(semaphore: Scalar, value: Any, *, memory_scope: object) -> None:
    del memory_scope
    semaphore.array[semaphore.index] += value


def _wait(barrier: Barriers | tuple[Barriers, int]) -> None:
    barriers, index = _barrier(barrier)
    barriers.wait(index)


def _arrive(barrier: Barriers | tuple[Barriers, int]) -> None:
    barriers, index = _barrier(barrier)
    barriers.arrive(index)


def _while_loop(condition: Callable[[Any], Any], body: Callable[[Any], Any], carry: Any) -> Any:
    while condition(carry):
        carry = body(carry)
    return carry


def _load(ref: Ref, layout: object, optimized: bool = True) -> np.ndarray:
    del layout, optimized
    return ref.array.copy()


def simulate(
    module: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    *,
    windows_end_beyond: bool = False,
    allocates: bool = False,
) -> None:
    """Replaces what a kernel's module uses of jax by the simulation.

    Args:
        module: the kernel's, or one of those that its parts come from.
        monkeypatch: which undoes it.
        windows_end_beyond: whether the kernel copies windows that end beyond an array.
        allocates: whether it allocates for all its threads by `run_scoped`: they begin there.
    """

    def run_scoped(
        function: Callable[..., Any], *specs: Any, collective_axes: object = None
    ) -> Any:
        scratch = jax.tree.map(lambda spec: spec.make(), specs)
        if collective_axes is None:
            return function(*scratch)
        numbers = range(_thread.num_threads)
        _spawn([({"wg": np.int32(wg)}, lambda: function(*scratch)) for wg in numbers])
        return None

    def kernel(
        body: Callable[..., object],
        *,
        out_type: Any,
        grid: tuple[int, ...],
        num_threads: int = 1,
        grid_names: tuple[str, ...] = ("tile",),
        thread_name: str | None = None,
        scratch_types: Any = (),
        **_: object,
    ) -> Callable[..., Any]:
        def run(*inputs: jax.Array) -> Any:
            outs = [np.full(out.shape, np.nan, out.dtype) for out in jax.tree.leaves(out_type)]
            refs = [Ref(np.array(array)) for array in inputs] + [Ref(out) for out in outs]
            _thread.semaphores, _thread.num_threads = {}, num_threads
            for tile in range(grid[0]):
                setattr(_thread, grid_names[0], np.int32(tile))
                scratch = [spec.make() for spec in scratch_types]
                if thread_name is None or allocates:
                    body(*refs, *scratch)
                    continue
                threads = [{thread_name: np.int32(wg)} for wg in range(num_threads)]
                _spawn([(axes, functools.partial(body, *refs, *scratch)) for axes in threads])
            results = [jax.numpy.asarray(out) for out in outs]
            return results if isinstance(out_type, list | tuple) else results[0]

        return run

    def get_global(spec: _Spec) -> Ref:
        return Ref(_thread.semaphores.setdefault(spec.shape, np.zeros(spec.shape, np.int32)))

    def warp_map(function: Callable[[int], object]) -> None:
        _spawn([({}, functools.partial(function, warp)) for warp in range(4)])

    def broadcast_in_dim(
        array: np.ndarray, shape: tuple[int, ...], dims: tuple[int, ...]
    ) -> np.ndarray:
        (dim,) = dims
        return np.broadcast_to(array[:, None] if dim == 0 else array[None], shape)

    nothing = lambda *_, **__: None  # noqa: E731
    plgpu = SimpleNamespace(
        ACC=lambda shape, dtype: _Spec(kind="acc", shape=shape),
        SMEM=_smem,
        RefUnion=lambda *specs: _Spec(kind="union", specs=specs),
        Barrier=lambda num_arrivals=1, num_barriers=1: _Spec(
            kind="barrier", num_arrivals=int(num_arrivals), num_barriers=num_barriers
        ),
        SemaphoreType=SimpleNamespace(REGULAR=lambda shape: _Spec(kind="semaphore", shape=shape)),
        CompilerParams=nothing,
        barrier_arrive=_arrive,
        barrier_wait=_wait,
        broadcasted_iota=_iota,
        commit_smem=nothing,
        commit_smem_to_gmem_group=nothing,
        copy_gmem_to_smem=functools.partial(_copy_in, copy=_fill if windows_end_beyond else _copy),
        copy_smem_to_gmem=lambda source, target, commit_group=True, **how: _copy(
            source, target, **how
        ),
        kernel=kernel,
        layout_cast=lambda array, layout: array,
        load=_load,
        semaphore_signal=_signal_semaphore,
        semaphore_wait=_wait_semaphore,
        set_max_registers=nothing,
        wait_smem_to_gmem=nothing,
        warp_map=warp_map,
        wgmma=_wgmma,
        wgmma_accumulator_load=lambda acc, wait_n: acc.value.copy(),
        wgmma_wait=nothing,
    )
    lax = SimpleNamespace(
        axis_index=lambda name: getattr(_thread, name),
        broadcast_in_dim=broadcast_in_dim,
        cond=lambda condition, yes, no, *args: yes(*args) if condition else no(*args),
        div=lambda a, b: a // b,
        fori_loop=_fori_loop,
        optimization_barrier=lambda value: value,
        rem=lambda a, b: a % b,
        while_loop=_while_loop,
    )
    pl = SimpleNamespace(
        cdiv=lambda a, b: -(-a // b),
        ds=lambda start, size: slice(int(start), int(start) + size),
        get_global=get_global,
        loop=_loop,
        run_scoped=run_scoped,
        when=_when,
    )
    replaced: dict[str, Any] = {"pl": pl, "plgpu": plgpu, "lax": lax, "jnp": np}
    replaced |= {"tiled_smem": _smem, "finish": lambda acc, in_flight: acc.value.copy()}
    replaced["swizzled"] = nothing
    replaced["row_views_smem"] = lambda shape, dtype: plgpu.RefUnion(*[_smem(shape, dtype)] * 2)
    replaced["store_global"] = lambda ref, array: ref.__setitem__(Ellipsis, np.asarray(array))
    for name, value in replaced.items():
        if hasattr(module, name):
            monkeypatch.setattr(module, name, value)
