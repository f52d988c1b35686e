"""Data that a run makes itself: a corpus, a tokenizer trained on it, packed rows.

What is there already is taken as it is, so that a run that is started again, or with other
settings, goes on with the data of the first.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from dsjax.config import DataConfig, SourceConfig
from dsjax.data.offline import pack
from dsjax.data.packed import MANIFEST
from dsjax.data.tokenizer import TOKENIZER_FILE
from dsjax.data.tokenizer_files import train_tokenizer

TRAIN, HELD_OUT = "train", "held_out"  # folders of a corpus
_FILES = "**/*.py"
_LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}

logger = logging.getLogger(__name__)


def is_prepared(data: DataConfig) -> bool:
    """Tells whether all that a run trains on is there, where `data.prepare` says how to make it."""
    folders = [Path(source.path).expanduser() for source in (*data.sources, *data.eval_sources)]
    has_tokenizer = (Path(data.tokenizer).expanduser() / TOKENIZER_FILE).exists()
    return has_tokenizer and all((folder / MANIFEST).exists() for folder in folders)


def prepare_data(data: DataConfig) -> None:
    """Makes what `data.prepare` describes and is not there yet.

    Args:
        data: says where the corpus, the tokenizer and the rows go.

    Raises:
        ValueError: a folder holds packed rows of other settings; names it.
    """
    if data.prepare is None or is_prepared(data):
        return
    places = (data.sources[0].path, data.eval_sources[0].path, data.tokenizer, data.prepare.folder)
    train, held_out, tokenizer, corpus = (Path(place).expanduser() for place in places)
    packed = {TRAIN: train, HELD_OUT: held_out}
    has_tokenizer = (tokenizer / TOKENIZER_FILE).exists()
    if not corpus.exists():
        logger.info("corpus: the source of this Python's standard library, to %s", corpus)
        collect_python_library(corpus, data.prepare.max_bytes)
    if not has_tokenizer:
        logger.info("tokenizer: byte-level BPE, to %s", tokenizer)
        train_tokenizer(_texts(corpus / TRAIN), data.prepare.vocab_size, tokenizer)
    for part, folder in packed.items():
        logger.info("packing: rows of %d tokens, to %s", data.length, folder)
        pack(
            [SourceConfig(str(corpus / part), "text", glob=_FILES)],
            folder,
            tokenizer=data.tokenizer,
            length=data.length,
            num_workers=data.num_workers,
            seed=data.seed,
            num_packing_bins=data.num_packing_bins,
            long_documents=data.long_documents,
        )


def collect_python_library(folder: Path, max_bytes: int = 0) -> None:
    """Copies the standard library's sources, one file in twenty of them to the held-out part.

    Args:
        folder: gets the folders `train` and `held_out`; appears once all is copied.
        max_bytes: bytes copied at most; 0 for all.

    Raises:
        ValueError: so few bytes leave a part without files.
    """
    draft = folder.with_name(folder.name + ".partial")
    shutil.rmtree(draft, ignore_errors=True)
    library = Path(sysconfig.get_path("stdlib"))
    size = 0
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library)
        num_bytes = path.stat().st_size
        if _LEFT_OUT & set(name.parts) or (max_bytes and size + num_bytes > max_bytes):
            continue
        size += num_bytes
        # By a hash of the name: the same files are held out on every machine.
        number = int(hashlib.sha256(str(name).encode()).hexdigest(), 16)
        copy = draft / (HELD_OUT if number % 20 == 0 else TRAIN) / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    if not all((draft / part).exists() for part in (TRAIN, HELD_OUT)):
        raise ValueError(
            f"data.prepare.max_bytes={max_bytes}: leaves no file to train or evaluate on"
        )
    draft.rename(folder)


def _texts(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob(_FILES)):
        yield path.read_bytes().decode("utf-8", errors="replace")
