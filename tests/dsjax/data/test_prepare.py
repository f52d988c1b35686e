"""Data that a run makes itself: once, all of it, and from nothing but this Python."""

from dataclasses import replace
from pathlib import Path

import pytest

from dsjax.config import DataConfig, PrepareConfig, SourceConfig
from dsjax.data.loader import make_loader
from dsjax.data.packed import read_manifest
from dsjax.data.prepare import collect_python_library, prepare_data


def data_in(folder: Path, **changes) -> DataConfig:
    config = DataConfig(
        sources=(SourceConfig(str(folder / "rows")),),
        eval_sources=(SourceConfig(str(folder / "held_out")),),
        tokenizer=str(folder / "tokenizer"),
        length=64,
        prepare=PrepareConfig("python_library", str(folder / "corpus"), 300, max_bytes=600_000),
    )
    return replace(config, **changes)


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_everything_is_made_once(tmp_path: Path):
    data = data_in(tmp_path)
    prepare_data(data)
    made = times(tmp_path)
    prepare_data(data)
    assert times(tmp_path) == made
    files = [path for path in (tmp_path / "corpus").rglob("*.py") if path.stat().st_size]
    bytes_of = {part: read_manifest(tmp_path / part)["num_bytes"] for part in ("rows", "held_out")}
    assert sum(bytes_of.values()) == sum(path.stat().st_size for path in files) <= 600_000
    assert bytes_of["rows"] > 5 * bytes_of["held_out"] > 0
    assert next(make_loader(data))["tokens"].shape == (64,)

    # What is missing is made again, from what is there.
    (tmp_path / "held_out" / "dataset.json").unlink()
    for file in (tmp_path / "held_out").iterdir():
        file.unlink()
    prepare_data(data)
    assert read_manifest(tmp_path / "held_out")["num_bytes"] == bytes_of["held_out"]
    assert times(tmp_path / "rows").items() <= made.items()


def test_too_small_a_corpus_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"data.prepare.max_bytes=1: leaves no file"):
        collect_python_library(tmp_path / "corpus", max_bytes=1)
    assert not (tmp_path / "corpus").exists()


def test_a_run_that_finds_its_data_ready_makes_nothing(tmp_path: Path):
    prepare_data(data_in(tmp_path, prepare=None))
    assert not list(tmp_path.iterdir())


@pytest.mark.core
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_sources": ()}, r"data.eval_sources=\(\): must be one of packed rows, to prepare"),
        ({"sources": (SourceConfig("a", "text"),)}, "data.sources=.*must be one of packed rows"),
        ({"tokenizer": "bytes"}, "data.tokenizer='?bytes'?: must be a folder"),
    ],
)
def test_what_cannot_be_prepared_is_refused(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        data_in(Path("x"), **changes)
