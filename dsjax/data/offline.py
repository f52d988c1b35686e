"""`dsjax data pack`: documents to a packed dataset, in parallel, resumable, the same every time.

The corpus is first cut into shards of consecutive documents, so what a shard holds depends on the
corpus and the settings, and not on who packs it. A finished shard has its counts beside it; a run
after a kill packs the others.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dsjax.config import SourceConfig
from dsjax.config.model import require_folder
from dsjax.data.packed import FORMAT, MANIFEST, new_shard, read_manifest
from dsjax.data.packing import LongDocuments, documents_of, pack_rows, tokenized
from dsjax.data.sources import Document, DocumentSource, open_documents
from dsjax.data.tokenizer import Tokenizer, load_tokenizer
from dsjax.files import DRAFT_SUFFIX, read_json, write_json
from dsjax.progress import JobProgress

PLAN = "packing.json"
SKIPPED = "skipped.txt"
_BYTES_PER_SHARD = 1 << 22
_MAX_SHARDS = 1024
# Documents are shuffled within windows, so that a row mixes them but a shard reads nearly in order.
_SHUFFLE_WINDOW = 1024

logger = logging.getLogger(__name__)


def pack(
    sources: Sequence[SourceConfig],
    destination: str | Path,
    *,
    tokenizer: str,
    length: int,
    num_workers: int = 0,
    num_shards: int = 0,
    seed: int = 0,
    num_packing_bins: int = 32,
    long_documents: LongDocuments = "split",
    on_error: Literal["stop", "skip"] = "stop",
    progress: bool = True,
) -> dict[str, Any]:
    """Packs documents into a dataset of fixed-length rows.

    Args:
        sources: text, JSON lines or Parquet; every document of each goes in once.
        destination: folder of the dataset; one that an earlier run left unfinished is resumed.
        tokenizer: "bytes" or the path of a tokenizer.json.
        length: tokens in a row.
        num_workers: processes; 0 works in this one. The result does not depend on it.
        num_shards: files; 0 takes one per 4 MiB of the corpus, at most 1024.
        seed: of the order of documents.
        num_packing_bins: rows filled at a time.
        long_documents: what becomes of a document longer than a row.
        on_error: whether a document that cannot be read stops the packing or is left out; those
            left out are counted in the manifest ("num_skipped") and listed in `skipped.txt`.
        progress: whether to show how far it is, as a bar on a terminal and as lines in a log.

    Returns:
        The manifest, as `packed.read_manifest` reads it. A dataset that is complete already, with
        these very settings, is left as it is.

    Raises:
        ValueError: when a source is missing, empty or damaged, or when the destination holds a
            dataset of other settings or other files.
    """
    if on_error not in ("stop", "skip"):
        raise ValueError(f"on_error={on_error!r} must be 'stop' or 'skip'")
    weights = [source.weight for source in sources]
    if len(set(weights)) > 1:
        raise ValueError(
            f"source.weight={weights}: every document is packed once, so weights must be equal; "
            "pack the sources apart and mix them in data.sources"
        )
    encoder = load_tokenizer(tokenizer)
    documents = Corpus([open_documents(source) for source in sources])
    if num_shards < 0:
        raise ValueError(f"num_shards={num_shards} must not be negative")
    if num_shards == 0:
        num_shards = max(1, min(documents.file_bytes // _BYTES_PER_SHARD, _MAX_SHARDS))
    plan = {
        "format": FORMAT,
        "length": length,
        "seed": seed,
        "num_packing_bins": num_packing_bins,
        "long_documents": long_documents,
        # Named where it is not the default, so that what was packed without it goes on.
        **({"on_error": on_error} if on_error != "stop" else {}),
        "num_shards": min(num_shards, len(documents)),
        "tokenizer": {
            "spec": tokenizer,
            "sha256": encoder.sha256,
            "vocab_size": encoder.vocab_size,
        },
        "sources": [
            {"path": s.path, "format": s.format, "text_field": s.text_field, "glob": s.glob}
            for s in sources
        ],
        "corpus": {
            "num_files": len(documents.files),
            "file_bytes": documents.file_bytes,
            "num_entries": len(documents),
        },
    }
    require_folder("destination", str(destination))
    folder = Path(destination).expanduser()
    finished = _prepare(folder, plan)
    if finished is not None:
        return finished
    job = _Job(folder, plan, documents, encoder)
    missing = [shard for shard in range(job.num_shards) if not job.counts_path(shard).exists()]
    done = sum(len(job.documents_in(s)) for s in range(job.num_shards) if s not in missing)
    shown = JobProgress("packing", len(documents), done, unit="documents", shown=progress)
    with shown:
        for shard in _run(job, missing, num_workers, lambda count: shown.reach(done + count)):
            logger.info("packed shard %d of %d", shard + 1, job.num_shards)
    return _finish(job)


class Corpus:
    """Several sources of documents, one after the other."""

    def __init__(self, sources: Sequence[DocumentSource]) -> None:
        self.files = [file for source in sources for file in source.files]
        self.file_bytes = sum(file.stat().st_size for file in self.files)
        self._sources = sources
        self._ends = np.cumsum([len(source) for source in sources]).tolist()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Document:
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self._sources[part][index - (self._ends[part - 1] if part else 0)]


class _Job:
    """Everything that a worker needs to pack any shard."""

    def __init__(
        self, folder: Path, plan: dict[str, Any], corpus: Corpus, tokenizer: Tokenizer
    ) -> None:
        self.folder = folder
        self.plan = plan
        self.corpus = corpus
        self.tokenizer = tokenizer
        self.num_shards: int = plan["num_shards"]

    def documents_in(self, shard: int) -> range:
        total = len(self.corpus)
        return range(shard * total // self.num_shards, (shard + 1) * total // self.num_shards)

    def rows_path(self, shard: int) -> Path:
        return self.folder / f"rows-{shard:05d}-of-{self.num_shards:05d}.arrayrecord"

    def counts_path(self, shard: int) -> Path:
        return self.rows_path(shard).with_suffix(".json")

    def pack_shard(self, shard: int, count: Counter) -> None:
        """Packs one shard; its counts are written last and say that it is whole."""
        order = _shuffled(self.documents_in(shard), (self.plan["seed"], shard))
        documents = _Counting(self.corpus, order, count, skip=self.plan.get("on_error") == "skip")
        rows = pack_rows(
            tokenized(
                documents_of(documents),
                self.tokenizer,
                length=self.plan["length"],
                long_documents=self.plan["long_documents"],
            ),
            length=self.plan["length"],
            num_packing_bins=self.plan["num_packing_bins"],
            seed=self.plan["seed"],
        )
        counts = dict.fromkeys(("num_rows", "num_tokens", "num_targets", "num_bytes"), 0)
        with new_shard(self.rows_path(shard)) as append:
            for row in rows:
                append(row)
                counts["num_rows"] += 1
                counts["num_tokens"] += int(np.count_nonzero(row["segment_ids"]))
                counts["num_targets"] += int(row["weights"].sum())
                counts["num_bytes"] += int(row["num_bytes"])
        counts["num_documents"] = documents.num_documents
        counts["num_replaced"] = documents.num_replaced
        counts["num_skipped"] = len(documents.skipped)
        parts = {"file": self.rows_path(shard).name, "skipped": list(documents.skipped.values())}
        write_json(self.counts_path(shard), parts | counts)


class _Counting:
    """Documents of one shard in their order, counted as they are read (each once)."""

    def __init__(self, corpus: Corpus, order: np.ndarray, count: Counter, *, skip: bool) -> None:
        self._skip = skip
        self.skipped: dict[int, str] = {}  # by document: why it was left out
        self._corpus = corpus
        self._order = order
        self._count = count
        self.num_documents = 0
        self.num_replaced = 0
        self.files = corpus.files

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Document:
        number = int(self._order[index])
        try:
            document = self._corpus[number]
        except ValueError as error:
            if not self._skip:
                raise
            self.skipped[number] = str(error)
            document = Document("", "")
        self.num_documents += bool(document.text)
        self.num_replaced += not document.intact
        self._count.add()
        return document


class Counter:
    """Documents read so far, over all processes."""

    def __init__(self, context: Any) -> None:
        self._value = context.Value("q", 0)

    def add(self) -> None:
        """Counts one more."""
        with self._value.get_lock():
            self._value.value += 1

    @property
    def value(self) -> int:
        """The count."""
        return self._value.value


def _shuffled(indices: range, seed: tuple[int, int]) -> np.ndarray:
    random = np.random.default_rng(seed)
    windows = [
        random.permutation(indices[start : start + _SHUFFLE_WINDOW])
        for start in range(0, len(indices), _SHUFFLE_WINDOW)
    ]
    return np.concatenate(windows)


def _prepare(folder: Path, plan: dict[str, Any]) -> dict[str, Any] | None:
    """Makes the folder ready for the plan; returns the manifest if all is done already."""
    folder.mkdir(parents=True, exist_ok=True)
    complete = (folder / MANIFEST).exists()
    if complete:
        found = read_manifest(folder)
    elif any(folder.glob("rows-*.json")):
        found = read_json(folder / PLAN)
    elif any(folder.iterdir()) and not (folder / PLAN).exists():
        raise ValueError(f"destination={str(folder)!r} must be empty or a packed dataset")
    else:  # empty, or an earlier run finished no shard: there is nothing to lose
        for leftover in folder.glob("rows-*"):
            leftover.unlink()
        write_json(folder / PLAN, plan)
        return None
    for name, value in plan.items():
        if found.get(name) != value:
            state = "a complete" if complete else "an unfinished"
            raise ValueError(
                f"destination={str(folder)!r} holds {state} dataset with "
                f"{name}={found.get(name)!r}, not {value!r}: remove it or choose another"
            )
    return found if complete else None


def _finish(job: _Job) -> dict[str, Any]:
    shards = [read_json(job.counts_path(shard)) for shard in range(job.num_shards)]
    skipped = [why for shard in shards for why in shard.get("skipped", ())]
    totals = {
        name: sum(shard.get(name, 0) for shard in shards)
        for name in shards[0]
        if name not in ("file", "skipped")
    }
    if totals["num_rows"] == 0:
        why = f" (left out: {skipped[0]})" if skipped else ""
        raise ValueError(f"sources are empty: none of the documents has any text{why}")
    if skipped:
        (job.folder / SKIPPED).write_text("".join(f"{why}\n" for why in skipped), "utf-8")
        logger.warning(
            "%d documents could not be read and were left out, the first: %s (all of them in %s)",
            *(len(skipped), skipped[0], job.folder / SKIPPED),
        )
    files = [{"file": s["file"], "num_rows": s["num_rows"]} for s in shards]
    write_json(job.folder / MANIFEST, job.plan | totals | {"shards": files})
    # The manifest stands: what was only there to resume from can go.
    for shard in range(job.num_shards):
        job.counts_path(shard).unlink()
    for leftover in [job.folder / PLAN, *job.folder.glob(f".*{DRAFT_SUFFIX}")]:
        leftover.unlink(missing_ok=True)
    if totals["num_replaced"]:
        logger.warning(
            "%d of %d documents held bytes that are no UTF-8, replaced by U+FFFD",
            totals["num_replaced"],
            totals["num_documents"],
        )
    return read_manifest(job.folder)


def _run(
    job: _Job, shards: list[int], num_workers: int, report: Callable[[int], None]
) -> Iterator[int]:
    """Packs shards and yields each that is done."""
    # Threads of jax or tokenizers do not survive a fork.
    context = multiprocessing.get_context("spawn")
    count = Counter(context)
    if num_workers == 0:
        for shard in shards:
            with _polling(count, report):
                job.pack_shard(shard, count)
            yield shard
        return
    with futures.ProcessPoolExecutor(
        num_workers, mp_context=context, initializer=_start_worker, initargs=(job, count)
    ) as pool:
        pending = {pool.submit(_pack_in_worker, shard): shard for shard in shards}
        try:
            with _polling(count, report):
                for future in futures.as_completed(pending):
                    future.result()
                    yield pending[future]
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


_worker: dict[str, Any] = {}


def _start_worker(job: _Job, count: Counter) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker.update(job=job, count=count)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    # A parent killed by SIGKILL tells nobody; its workers would wait for work for ever.
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _pack_in_worker(shard: int) -> None:
    _worker["job"].pack_shard(shard, _worker["count"])


@contextmanager
def _polling(count: Counter, report: Callable[[int], None]) -> Iterator[None]:
    """Reports the count five times a second while the body runs."""
    stop = threading.Event()

    def poll() -> None:
        while not stop.wait(0.2):
            report(count.value)

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        report(count.value)
