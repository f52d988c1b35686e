"""Conversion between Hugging Face folders and checkpoints of ours, tensor by tensor.

The source tells which way. Every header is checked before anything is written. The work is done in
`DST.partial`, with a journal of the tensors that are safely on the disk: a run after a kill or a
full disk goes on where the last one stopped. DST appears, by a rename, when all is done.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path as FilePath

import jax.numpy as jnp
import numpy as np

from dsjax.config import QuantisationConfig, to_json
from dsjax.config.load import load_recipe
from dsjax.config.model import require_folder
from dsjax.config.stored import model_to_json
from dsjax.data.tokenizer_files import mend_tokenizer
from dsjax.families.strided_copy import copy_strided
from dsjax.families.tensors import HFTensor, Path
from dsjax.files import naming, sync, write_bytes, write_json, write_text
from dsjax.progress import JobProgress
from dsjax.weights.assets import ASSETS, copy_files
from dsjax.weights.calibration import Calibration
from dsjax.weights.calibration_text import CalibrationText, read_text
from dsjax.weights.checksums import write_checksums
from dsjax.weights.hf_export import (
    HEADERS_FILE,
    config_json,
    create_file,
    lay_out,
    main_dtype,
    pack_headers,
    plan_shards,
    read_tensor,
    unpack_headers,
    write_tensor,
)
from dsjax.weights.hub import resolve
from dsjax.weights.journal import Journal, identity_of
from dsjax.weights.param_store import ITEM, ParamStore, one_line
from dsjax.weights.quantised import quantise_part, require_not_quantised
from dsjax.weights.quantised_export import plan_export
from dsjax.weights.run_steps import chosen_step
from dsjax.weights.safetensors import INDEX_NAME
from dsjax.weights.sources import MANIFEST, CheckpointSource, HFSource, open_source, weight_dtype
from dsjax.weights.stored_params import on_disk, stored_params, to_disk

_WORKERS = 4
# What is redone after a kill at most: so many bytes between two entries of the journal.
_COMMIT_BYTES = 256 << 20

DTypeOf = Callable[[Path], np.dtype]


def convert(
    src: str | FilePath,
    dst: str | FilePath,
    *,
    dtype: str | None = None,
    progress: bool = True,
    allow_nonfinite: bool = False,
    step: int | None = None,
    quantize: str | FilePath | QuantisationConfig | None = None,
    ema: bool = False,
    calibrate: str | FilePath | None = None,
) -> None:
    """Converts a checkpoint.

    Args:
        src: a Hugging Face folder or Hub name, which becomes a checkpoint of ours; or a checkpoint
            of ours, a training run or one of its steps, which becomes a Hugging Face folder.
        dst: a folder that does not exist yet.
        dtype: of the tensors written, "bfloat16" or "float32"; None keeps them bit by bit.
        progress: whether to show how far it is, as a bar on a terminal and as lines in a log.
        allow_nonfinite: whether NaN and infinite weights are converted like others.
        step: of a training run; None takes the newest that is not damaged.
        quantize: a recipe that stores weights in fewer bits, or the name or file of one, such as
            "int4"; the result is a checkpoint of ours, whatever the source.
        ema: of a training run: takes the moving average of its weights (`optimizer.ema_decay`).
        calibrate: a text, a file or a folder, by which the numbers of weights of 4 bits are
            searched for (`weights.calibration`); None rounds each weight by itself.

    Raises:
        FileExistsError: there is something at `dst`.
        ValueError: the source is damaged, no checkpoint, or holds NaN or infinity; names file and
            tensor.
        OSError: a file cannot be written, on a full disk for instance; names it. Run again to
            go on.
    """
    require_folder("destination", str(dst))
    dst = FilePath(dst)
    if dst.exists():
        raise FileExistsError(f"{dst}: exists already")
    stored = None if dtype is None else jnp.dtype(weight_dtype(dtype))
    recipe = None if quantize is None else load_recipe(quantize)
    if calibrate is not None and recipe is None:
        raise ValueError("calibrate: searches 4-bit numbers: give quantize too")
    if calibrate is not None and allow_nonfinite:
        raise ValueError("calibrate: multiplies weights with a text: it takes no allow_nonfinite")
    source = open_source(chosen_step(resolve(src), step), allow_nonfinite, ema)
    if recipe is not None:
        require_not_quantised(source)
    text = None
    if calibrate is not None and recipe is not None:
        text = read_text(FilePath(calibrate), source, recipe)

    def dtype_of(path: Path) -> np.dtype:
        return source.dtype(path) if stored is None else stored

    work = dst.with_name(dst.name + ".partial")
    work.mkdir(parents=True, exist_ok=True)
    out = work / "out"
    identity = identity_of(source) | {"dtype": dtype}
    if recipe is not None:
        identity |= {"quantisation": to_json(recipe)}
    if ema:
        identity |= {"ema": True}
    if text is not None:
        identity |= {"calibration": text.identity}
    with contextlib.closing(source), naming(work), Journal(work, identity) as journal:
        if isinstance(source, HFSource) or recipe is not None:
            _to_checkpoint(source, recipe, text, work, dtype_of, journal, progress)
        elif source.recipe is not None:
            _to_quantised_hf(source, out, stored, journal, progress)
        else:
            _to_hf(source, out, dtype_of, journal, progress)
        out.rename(dst)
        shutil.rmtree(work)


def _to_checkpoint(
    source: HFSource | CheckpointSource,
    recipe: QuantisationConfig | None,
    text: CalibrationText | None,
    work: FilePath,
    dtype_of: DTypeOf,
    journal: Journal,
    progress: bool,
) -> None:
    out = work / "out"
    table, params = source.table, stored_params(source.config, recipe)
    store = ParamStore.create(
        out,
        {
            path: on_disk(shape, dtype_of(path) if dtype is None else dtype)
            for path, (shape, dtype) in params.leaves.items()
        },
        {path: table.params[(*path[:-1], "weight")].num_stacked for path in params.leaves},
    )

    def write_leaf(path: Path, index: tuple[int, ...], values: np.ndarray) -> None:
        try:
            store.write(path, index, to_disk(values)).result()
        except ValueError as error:
            file = out / ITEM / ".".join(path)
            raise OSError(f"{file}: cannot be written: {one_line(error)}") from None

    searched: frozenset[Path] = frozenset()
    if text is not None and recipe is not None:
        calibration = Calibration(source, recipe, text, write_leaf)
        calibration.run(work, progress)
        searched = calibration.searched

    def read_whole(tensor: HFTensor) -> np.ndarray:
        if isinstance(source, HFSource):
            values = source.folder.read(tensor.name, 0, int(np.prod(tensor.shape)))
            return values.reshape(tensor.shape)
        return read_tensor(table, tensor.name, source.read)

    def write(tensor: HFTensor) -> None:
        parts = [part for part in tensor.parts if part.path[:-1] not in searched]
        if not parts:
            return
        values = read_whole(tensor).reshape(-1)
        for part in parts:
            window = tuple(slice(0, size) for size in tensor.part_shape(part))
            source_piece = tensor.read_part(part, window, lambda _, i, j: values[i:j])
            matrix = params.matrices.get(part.path[:-1])
            if matrix is not None:
                for name, leaf in quantise_part(source_piece, part.index, *matrix).items():
                    write_leaf((*part.path[:-1], name), part.index, leaf)
                continue
            source_piece = source_piece.astype(dtype_of(part.path), copy=False)
            piece = np.empty(source_piece.shape, source_piece.dtype)
            copy_strided(piece, source_piece)
            write_leaf(part.path, part.index, piece)

    # tensorstore syncs each chunk that it commits, so nothing is left to sync here.
    names = source.folder.tensors if isinstance(source, HFSource) else table.tensors
    order = [table.tensors[name] for name in names if name in table.tensors]
    _run(order, dtype_of, write, lambda _: None, journal, progress)
    copy_files(source.assets, out / ASSETS)
    if isinstance(source, HFSource) and recipe is None:
        write_text(out / HEADERS_FILE, pack_headers(source.folder.headers))
    write_json(out / MANIFEST, model_to_json(source.config, recipe))
    write_checksums(out)


def _to_hf(
    source: CheckpointSource, out: FilePath, dtype_of: DTypeOf, journal: Journal, progress: bool
) -> None:
    table, headers, index = source.table, None, None
    if (source.where / HEADERS_FILE).is_file():
        headers = unpack_headers(source.where / HEADERS_FILE)
        if INDEX_NAME in source.assets:
            index = source.assets[INDEX_NAME].read_bytes()
    plan = plan_shards(table, dtype_of, original=headers, index=index)
    out.mkdir(exist_ok=True)
    for name, header in plan.headers.items():
        create_file(out / name, header)
    place = {tensor: name for name, header in plan.headers.items() for tensor in header.tensors}

    def read(path: Path, window: tuple[slice, ...]) -> np.ndarray:
        return source.read(path, window).astype(dtype_of(path), copy=False)

    def write(tensor: HFTensor) -> None:
        name = place[tensor.name]
        values = read_tensor(table, tensor.name, read)
        write_tensor(out / name, plan.headers[name], tensor.name, values)

    def sync_files(tensors: list[HFTensor]) -> None:
        for name in {place[tensor.name] for tensor in tensors}:
            sync(out / name)

    _run([table.tensors[name] for name in place], dtype_of, write, sync_files, journal, progress)
    assets = {name: file for name, file in source.assets.items() if name != INDEX_NAME}
    copy_files(assets, out)
    mend_tokenizer(out)
    if plan.index is not None:
        write_bytes(out / INDEX_NAME, plan.index)
    main = main_dtype(table, dtype_of)
    write_bytes(out / "config.json", config_json(source.config, main, source.assets))


def _to_quantised_hf(
    source: CheckpointSource,
    out: FilePath,
    dtype: np.dtype | None,
    journal: Journal,
    progress: bool,
) -> None:
    export, tensors = plan_export(source, dtype), source.table.tensors
    entries = {name: export.entries(tensor) for name, tensor in tensors.items()}
    plan = lay_out({name: entry for each in entries.values() for name, entry in each.items()})
    out.mkdir(exist_ok=True)
    for name, header in plan.headers.items():
        create_file(out / name, header)
    place = {tensor: name for name, header in plan.headers.items() for tensor in header.tensors}

    def write(tensor: HFTensor) -> None:
        for name, values in export.read(tensor).items():
            write_tensor(out / place[name], plan.headers[place[name]], name, values)

    def sync_files(batch: list[HFTensor]) -> None:
        for name in {place[entry] for tensor in batch for entry in entries[tensor.name]}:
            sync(out / name)

    _run(list(tensors.values()), source.dtype, write, sync_files, journal, progress)
    assets = {name: file for name, file in source.assets.items() if name != INDEX_NAME}
    copy_files(assets, out)
    mend_tokenizer(out)
    if plan.index is not None:
        write_bytes(out / INDEX_NAME, plan.index)
    main = "bfloat16" if dtype is None else dtype.name
    text = config_json(source.config, main, source.assets)
    if export.config is not None:
        content = json.loads(text) | {"quantization_config": export.config}
        text = (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
    write_bytes(out / "config.json", text)


def _run(
    tensors: list[HFTensor],
    dtype_of: DTypeOf,
    write: Callable[[HFTensor], None],
    sync_files: Callable[[list[HFTensor]], None],
    journal: Journal,
    progress: bool,
) -> None:
    """Writes every tensor that the journal does not hold yet, a few at a time."""
    sizes = {
        tensor.name: int(np.prod(tensor.shape)) * dtype_of(tensor.parts[0].path).itemsize
        for tensor in tensors
    }
    finished = sum(size for name, size in sizes.items() if name in journal.done)
    left = [tensor for tensor in tensors if tensor.name not in journal.done]
    with (
        JobProgress(
            "converting", sum(sizes.values()), finished, unit="bytes", shown=progress
        ) as shown,
        ThreadPoolExecutor(_WORKERS) as pool,
        ThreadPoolExecutor(1) as committer,
    ):

        def commit(batch: list[HFTensor]) -> None:
            sync_files(batch)
            journal.add([tensor.name for tensor in batch])

        committed = committer.submit(commit, [])
        for batch in _batches(left, sizes):
            for tensor, _ in zip(batch, pool.map(write, batch), strict=True):
                shown.advance(sizes[tensor.name])
            committed.result()  # while one batch goes to the disk, only the next is read
            committed = committer.submit(commit, batch)
        committed.result()


def _batches(tensors: list[HFTensor], sizes: Mapping[str, int]) -> Iterator[list[HFTensor]]:
    batch: list[HFTensor] = []
    filled = 0
    for tensor in tensors:
        batch.append(tensor)
        filled += sizes[tensor.name]
        if filled >= _COMMIT_BYTES:
            yield batch
            batch, filled = [], 0
    if batch:
        yield batch
