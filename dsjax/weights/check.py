"""Whether what lies on the disk is whole: all that matters is read, and every fault named."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path as FilePath

from dsjax.config.run_file import METRICS_FILE, RUN_FILE
from dsjax.data.tokenizer import TOKENIZER_FILE, load_tokenizer
from dsjax.files import naming
from dsjax.progress import JobProgress
from dsjax.weights.assets import Assets
from dsjax.weights.checksums import checksum_faults
from dsjax.weights.hf_export import HEADERS_FILE, unpack_headers
from dsjax.weights.param_store import ParamStore
from dsjax.weights.run_steps import STEPS_FOLDER, missing_parts, steps_of
from dsjax.weights.safetensors import read_header
from dsjax.weights.sources import (
    CheckpointSource,
    HFSource,
    describe,
    find_kind,
    is_run,
    stored_recipe,
)
from dsjax.weights.step_parts import check_step

_WORKERS = 4
_PIECE_BYTES = 64 << 20

Work = tuple[Callable[[], object], int]  # what reads and may raise, and its bytes


def faults_of(where: FilePath, progress: bool = True) -> Iterator[str]:
    """Reads all that a model or a run needs, and yields a line for each fault.

    Of a Hugging Face folder and a checkpoint of ours: the description, every small file and every
    tensor, which must be finite. Of a run: the same of each of its steps, the optimiser's arrays
    and the place in the data included, and its metrics.

    Args:
        where: a Hugging Face folder, a checkpoint of ours, a run or one of its steps.
        progress: whether to show how far it is.

    Raises:
        FileNotFoundError: there is nothing there.
        ValueError: there is something else there.
    """
    if is_run(where):
        yield from checksum_faults(where)
        yield from _small_faults(where)
        yield from _metrics_faults(where / METRICS_FILE)
        steps = steps_of(where)
        if not steps:
            yield f"{where / STEPS_FOLDER}: holds no step"
        for step in sorted(steps, key=lambda step: int(step.name)):
            yield from _step_faults(step, progress)
        return
    kind, _, folder = find_kind(where)
    if kind == "step":
        yield from _step_faults(where, progress)
        return
    yield from checksum_faults(folder)
    yield from _small_faults(where)
    yield from _hf_faults(where, progress) if kind == "hf" else _model_faults(where, progress)


def _small_faults(where: FilePath) -> Iterator[str]:
    """Reads the description and what else is text."""
    try:
        _, assets = describe(where)
    except (ValueError, OSError) as error:
        yield _line(error)
        assets = {}
    yield from _asset_faults(assets)
    if (where / HEADERS_FILE).is_file():
        yield from _fault(lambda: unpack_headers(where / HEADERS_FILE))


def _asset_faults(assets: Assets) -> Iterator[str]:
    for name, file in assets.items():
        if name == TOKENIZER_FILE:
            yield from _fault(functools.partial(load_tokenizer, str(file)))
        elif name.endswith(".json"):
            yield from _fault(functools.partial(_read_any_json, file))


def _hf_faults(where: FilePath, progress: bool) -> Iterator[str]:
    damaged: list[str] = []
    for file in sorted(where.glob("[!.]*.safetensors")):
        damaged += _fault(functools.partial(read_header, file))
    yield from damaged
    if damaged:
        return
    try:
        config, assets = describe(where)
        source = HFSource(where, config, assets)
    except (ValueError, OSError) as error:
        yield _line(error)
        return
    with contextlib.closing(source):
        work: list[Work] = []
        for name in source.table.tensors:
            _, stored = source.folder.tensors[name]
            size = math.prod(stored.shape)
            bytes_each = (stored.stop - stored.start) // max(size, 1)
            piece = _PIECE_BYTES // max(bytes_each, 1)
            for start in range(0, size, piece):
                stop = min(start + piece, size)
                read = functools.partial(source.folder.read, name, start, stop)
                work.append((read, (stop - start) * bytes_each))
        yield from _run(work, where, progress)


def _model_faults(where: FilePath, progress: bool) -> Iterator[str]:
    yield from _array_faults(where, progress, ("params",))
    yield from _fault(
        lambda: CheckpointSource(where, *describe(where), recipe=stored_recipe(where))
    )


def _step_faults(step: FilePath, progress: bool) -> Iterator[str]:
    lacking = missing_parts(step)
    if lacking:
        yield f"{step}: lacks {', '.join(lacking)}"
    yield from _array_faults(step, progress, ("params", "optimizer"))
    run = step.absolute().parent.parent
    if not lacking and (run / RUN_FILE).is_file():
        yield from _fault(lambda: CheckpointSource(step, *describe(step)))
    yield from _fault(lambda: check_step(step))


def _array_faults(where: FilePath, progress: bool, items: tuple[str, ...]) -> Iterator[str]:
    """Reads every array of a checkpoint in pieces of whole chunks."""
    work: list[Work] = []
    for item in items:
        if not (where / item).is_dir():
            continue
        try:
            store = ParamStore.open(where, item=item)
        except (ValueError, OSError) as error:
            yield _line(error)
            continue
        for path in store.arrays:
            work += list(_pieces(store, path))
    yield from _run(work, where, progress)


def _pieces(store: ParamStore, path: tuple[str, ...]) -> Iterator[Work]:
    shape, itemsize = store.shape(path), store.dtype(path).itemsize
    steps = list(store.chunk(path))
    for axis in reversed(range(len(shape))):  # whole chunks, as many as fit
        room = _PIECE_BYTES // max(1, math.prod(steps) * itemsize)
        steps[axis] *= max(1, min(room, -(-shape[axis] // steps[axis])))
    starts = (range(0, size, step) for size, step in zip(shape, steps, strict=True))
    for corner in itertools.product(*starts):
        window = tuple(
            slice(start, min(start + step, size))
            for start, step, size in zip(corner, steps, shape, strict=True)
        )
        yield (
            functools.partial(store.read, path, window),
            math.prod(w.stop - w.start for w in window) * itemsize,
        )


def _run(work: list[Work], where: FilePath, progress: bool) -> Iterator[str]:
    """Reads all pieces, a few at a time; one line for an array, however many pieces fail."""
    said: set[str] = set()
    total = sum(size for _, size in work)
    with (
        JobProgress(f"reading {where.name}", total, unit="bytes", shown=progress) as shown,
        ThreadPoolExecutor(_WORKERS) as pool,
    ):
        for (_, size), faults in zip(
            work, pool.map(lambda piece: list(_fault(piece[0])), work), strict=True
        ):
            shown.advance(size)
            for fault in faults:
                array = fault.split(": ")[:2]
                if str(array) not in said:
                    said.add(str(array))
                    yield fault


def _metrics_faults(path: FilePath) -> Iterator[str]:
    if not path.is_file():
        return
    damaged = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            sound = isinstance(json.loads(line), dict)
        except ValueError:
            sound = False
        if not sound:
            damaged.append(str(number))
    if damaged:
        few = ", ".join(damaged[:5]) + (", ..." if len(damaged) > 5 else "")
        yield f"{path}: {len(damaged)} damaged lines: {few}"


def _fault(read: Callable[[], object]) -> Iterator[str]:
    try:
        read()
    except (ValueError, OSError, KeyError, TypeError) as error:
        yield _line(error)


def _read_any_json(file: FilePath) -> None:
    with naming(file):
        try:
            json.loads(file.read_bytes())
        except ValueError as error:
            raise ValueError(f"{file}: not JSON: {error}") from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
