"""`dsjax data pack`: the same dataset however it is made, and never one that is half there."""

import hashlib
import io
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from dsjax.config.data import SourceConfig
from dsjax.data.offline import pack
from dsjax.data.packed import PackedRows, read_manifest
from tests.dsjax.data.packing_oracle import check_rows, random_texts

LENGTH = 64


def write_corpus(folder: Path, texts: list[str], lines_per_file: int = 25) -> SourceConfig:
    folder.mkdir()
    for start in range(0, len(texts), lines_per_file):
        lines = [json.dumps({"text": text}) for text in texts[start : start + lines_per_file]]
        (folder / f"part-{start:06d}.jsonl").write_text("\n".join(lines) + "\n")
    return SourceConfig(str(folder), "jsonl")


def digest(folder: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.iterdir())
    }


def test_every_document_is_packed_once_and_counted(tmp_path: Path) -> None:
    texts = random_texts(300, 200, 0)
    first = write_corpus(tmp_path / "first", texts[:200])
    second = write_corpus(tmp_path / "second", texts[200:])
    manifest = pack(
        [first, second], tmp_path / "out", tokenizer="bytes", length=LENGTH, num_shards=3, seed=5
    )
    rows = PackedRows(tmp_path / "out")
    check_rows((rows[i] for i in range(len(rows))), texts, LENGTH)
    assert manifest == read_manifest(tmp_path / "out")
    assert (manifest["length"], manifest["seed"], manifest["num_shards"]) == (LENGTH, 5, 3)
    assert manifest["num_rows"] == len(rows)
    assert manifest["num_bytes"] == sum(len(text.encode()) for text in texts)
    assert manifest["num_documents"] == sum(1 for text in texts if text)
    assert manifest["num_targets"] == manifest["num_bytes"] + manifest["num_documents"]
    assert manifest["tokenizer"] == {"spec": "bytes", "sha256": "bytes", "vocab_size": 258}
    names = [f"rows-{i:05d}-of-00003.arrayrecord" for i in range(3)]
    assert sorted(os.listdir(tmp_path / "out")) == ["dataset.json", *names]


def test_the_result_does_not_depend_on_the_workers(tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "corpus", random_texts(200, 200, 1))
    settings: dict[str, Any] = {"tokenizer": "bytes", "length": LENGTH, "num_shards": 5}
    for workers in (0, 2):
        pack([source], tmp_path / str(workers), num_workers=workers, **settings)
    assert digest(tmp_path / "0") == digest(tmp_path / "2")
    assert len(digest(tmp_path / "0")) == 6
    pack([source], tmp_path / "other seed", seed=1, **settings)
    assert digest(tmp_path / "0") != digest(tmp_path / "other seed")
    assert multiprocessing.active_children() == []


KILLED = """
import sys
from dsjax.config.data import SourceConfig
from dsjax.data.offline import pack
if __name__ == "__main__":
    pack([SourceConfig(sys.argv[1], "jsonl")], sys.argv[2], tokenizer="bytes", length=64,
         num_workers=1, num_shards=24)
"""


@pytest.mark.slow
def test_a_killed_run_is_resumed(tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "corpus", random_texts(2400, 400, 2), 400)
    script, out = tmp_path / "killed.py", tmp_path / "out"
    script.write_text(KILLED)
    process = subprocess.Popen([sys.executable, str(script), source.path, str(out)])
    while len(list(out.glob("rows-*.json"))) < 2:
        assert process.poll() is None
        time.sleep(0.005)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive, "workers outlive the process that was killed"

    finished = {file: file.stat().st_mtime_ns for file in out.glob("rows-*.json")}
    assert 2 <= len(finished) < 24
    with pytest.raises(ValueError, match=r"no dataset.json, so no packed dataset, or one whose"):
        PackedRows(out)
    settings: dict[str, Any] = {"tokenizer": "bytes", "num_shards": 24}
    with pytest.raises(ValueError, match="unfinished dataset with length=64, not 32"):
        pack([source], out, length=32, **settings)
    kept = {file.with_suffix(".arrayrecord"): 0 for file in finished}
    kept = {file: file.stat().st_mtime_ns for file in kept}

    manifest = pack([source], out, length=64, **settings)
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert manifest == pack([source], tmp_path / "fresh", length=64, **settings)
    assert digest(out) == digest(tmp_path / "fresh")  # nothing left over either


FULL_DISK = """
import resource, signal, sys
from dsjax.config.data import SourceConfig
from dsjax.data.offline import pack
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))  # a write past it fails
try:
    pack([SourceConfig(sys.argv[1], "jsonl")], sys.argv[2], tokenizer="bytes", length=64,
         num_shards=2)
except OSError as error:
    print(error)
"""


def test_a_disk_that_is_full_is_named_and_nothing_lost(tmp_path: Path) -> None:
    # The second half of the documents is larger than the disk takes, the first is not.
    source = write_corpus(tmp_path / "corpus", ["small"] * 15 + random_texts(15, 60000, 8))
    out = tmp_path / "out"
    command = [sys.executable, "-c", FULL_DISK, source.path, str(out)]
    message = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert message.startswith(f"{out}/rows-00001-of-00002.arrayrecord: shard cannot be written")
    assert message.count("\n") == 1
    kept = ["packing.json", "rows-00000-of-00002.arrayrecord", "rows-00000-of-00002.json"]
    assert sorted(os.listdir(out)) == kept
    settings: dict[str, Any] = {"tokenizer": "bytes", "length": 64, "num_shards": 2}
    assert pack([source], out, **settings) == pack([source], tmp_path / "fresh", **settings)


class Terminal(io.StringIO):
    """Standard error, as a terminal has it."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_a_bar_and_a_log_a_line(tmp_path: Path, monkeypatch) -> None:
    source = write_corpus(tmp_path / "corpus", random_texts(60, 100, 6))
    for name, stream in (("bar", Terminal()), ("log", io.StringIO())):
        monkeypatch.setattr(sys, "stderr", stream)
        pack([source], tmp_path / name, tokenizer="bytes", length=LENGTH)
        shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())  # without the colours
        assert ("60/60 documents" in shown) == (name == "bar")
    assert re.fullmatch(r"packing: 100% of 60 documents, [\d,]+ documents/s\n", shown)


def test_a_complete_dataset_is_left_alone(tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "corpus", random_texts(50, 100, 3))
    out = tmp_path / "out"
    first = pack([source], out, tokenizer="bytes", length=LENGTH)
    before = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    assert pack([source], out, tokenizer="bytes", length=LENGTH) == first
    assert {file: file.stat().st_mtime_ns for file in out.iterdir()} == before
    with pytest.raises(ValueError, match="a complete dataset with seed=0, not 1: remove it"):
        pack([source], out, tokenizer="bytes", length=LENGTH, seed=1)
    (Path(source.path) / "more.jsonl").write_text('{"text": "more"}\n')
    with pytest.raises(ValueError, match="a complete dataset with corpus="):
        pack([source], out, tokenizer="bytes", length=LENGTH)


def test_a_folder_of_something_else_is_not_touched(tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "corpus", ["text"])
    with pytest.raises(ValueError, match="must be empty or a packed dataset"):
        pack([source], source.path, tokenizer="bytes", length=LENGTH)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bad_document_ends_the_run_and_is_named(tmp_path: Path, num_workers: int) -> None:
    source = write_corpus(tmp_path / "corpus", ["fine"] * 30)
    (tmp_path / "corpus" / "part-000025.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"part-000025.jsonl:2: not JSON"):
        pack([source], out, tokenizer="bytes", length=8, num_shards=3, num_workers=num_workers)
    finished = [shard for shard in range(3) if (out / f"rows-{shard:05d}-of-00003.json").exists()]
    assert len(list(out.iterdir())) == 1 + 2 * len(finished)  # the plan, two files a shard
    assert not (out / "dataset.json").exists()
    assert multiprocessing.active_children() == []


def test_a_run_that_finished_no_shard_may_change_its_settings(tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "corpus", ["much too long"])
    settings: dict[str, Any] = {"tokenizer": "bytes", "length": 8}
    with pytest.raises(ValueError, match="document of 15 tokens is longer than a row, length=8"):
        pack([source], tmp_path / "out", long_documents="error", **settings)
    assert pack([source], tmp_path / "out", **settings)["num_rows"] == 2


def test_bad_settings_are_named(tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "corpus", ["", ""])
    with pytest.raises(ValueError, match="sources are empty: none of the documents has any text"):
        pack([source], tmp_path / "a", tokenizer="bytes", length=8)
    other = SourceConfig(source.path, "jsonl", weight=2.0)
    with pytest.raises(ValueError, match="weights must be equal"):
        pack([source, other], tmp_path / "b", tokenizer="bytes", length=8)
    with pytest.raises(ValueError, match="num_shards=-1 must not be negative"):
        pack([source], tmp_path / "b", tokenizer="bytes", length=8, num_shards=-1)


@pytest.mark.parametrize("damage", ["missing", "truncated", "rows", "format"])
def test_damaged_datasets_are_named(tmp_path: Path, damage: str) -> None:
    source = write_corpus(tmp_path / "corpus", random_texts(50, 100, 4))
    out = tmp_path / "out"
    manifest = pack([source], out, tokenizer="bytes", length=LENGTH)
    shard = out / manifest["shards"][0]["file"]
    expected = f"{shard.name}: shard"
    if damage == "missing":
        shard.unlink()
    elif damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-70000])
    elif damage == "rows":
        manifest["shards"][0]["num_rows"] -= 1
        expected = f"{shard.name}: shard holds {manifest['num_rows']} rows, dataset.json says"
    else:
        manifest["format"] = "something else"
        expected = "dataset.json: format 'something else' must be"
    (out / "dataset.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=expected):
        PackedRows(out)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_documents_are_left_out_counted_and_listed(tmp_path, num_workers: int) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"text": 7}\nno JSON\n{"text": "fine"}\n')
    source = SourceConfig(str(tmp_path / "a.jsonl"), "jsonl")
    options: dict[str, Any] = {"tokenizer": "bytes", "length": 8, "num_workers": num_workers}
    with pytest.raises(ValueError, match=r"a.jsonl:"):
        pack([source], tmp_path / "stopped", **options)
    manifest = pack([source], tmp_path / "out", **options, on_error="skip")
    assert (manifest["num_documents"], manifest["num_skipped"]) == (2, 2)
    listed = (tmp_path / "out/skipped.txt").read_text().splitlines()
    assert sorted(line.partition("a.jsonl:")[2][:1] for line in listed) == ["2", "3"]
    assert pack([source], tmp_path / "out", **options, on_error="skip") == manifest
