"""Sources of documents: what they hold, and what they say of damaged input."""

import json
import pickle
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from dsjax.config.data import SourceConfig
from dsjax.data.sources import open_documents

TEXTS = ["one\r\ntwo\n", "ünï 🤗", "x" * 100, "last"]


def texts_of(source: SourceConfig) -> list[str]:
    documents = open_documents(source)
    copy = pickle.loads(pickle.dumps(documents))  # as a worker gets it
    assert [copy[i] for i in range(len(copy))] == [documents[i] for i in range(len(documents))]
    return [documents[i].text for i in range(len(documents))]


def test_text_files_in_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name, text in zip(["a.txt", "b/a.txt", "b/c.txt", "d.txt"], TEXTS, strict=True):
        (tmp_path / name).write_bytes(text.encode())
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "other.md").write_text("not this one")
    assert texts_of(SourceConfig(str(tmp_path), "text")) == TEXTS
    assert texts_of(SourceConfig(str(tmp_path), "text", glob="*.md")) == ["not this one"]
    assert texts_of(SourceConfig(str(tmp_path / "b" / "c.txt"), "text")) == [TEXTS[2]]


def test_bytes_that_are_no_utf8_are_replaced_and_told(tmp_path: Path, caplog) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9!")
    document = open_documents(SourceConfig(str(tmp_path), "text"))[0]
    assert (document.text, document.intact) == ("caf\ufffd!", False)
    assert "a.txt: bytes that are no UTF-8 replaced" in caplog.text


def test_json_lines(tmp_path: Path) -> None:
    lines = [json.dumps({"content": text, "id": 1}) for text in TEXTS]
    (tmp_path / "a.jsonl").write_text("\n".join(lines[:2]))  # no newline at the end
    (tmp_path / "b.jsonl").write_text("\n" + "\r\n\n".join(lines[2:]) + "\n\n")
    (tmp_path / "c.jsonl").write_text("")
    assert texts_of(SourceConfig(str(tmp_path), "jsonl", text_field="content")) == TEXTS


def test_json_lines_over_many_blocks(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("dsjax.data.sources._SCAN_BYTES", 7)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    assert texts_of(SourceConfig(str(tmp_path), "jsonl")) == TEXTS


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"text": "cut', "not JSON"),
        ('{"body": "x"}', "no field 'text'"),
        ('{"text": 7}', "field 'text' is int, not text"),
        ("[1, 2]", "not a JSON object"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, problem: str) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"text": "good"}}\n\n{line}\n')
    documents = open_documents(SourceConfig(str(tmp_path), "jsonl"))
    assert documents[0].text == "good"
    with pytest.raises(ValueError, match=f"a.jsonl:3: {problem}") as error:
        documents[1]
    assert "\n" not in str(error.value)


def test_a_lone_surrogate_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b"}\n')
    document = open_documents(SourceConfig(str(tmp_path), "jsonl"))[0]
    assert (document.text, document.intact) == ("a?b", False)


def test_parquet(tmp_path: Path) -> None:
    for name, part in (("a", TEXTS[:3]), ("b", TEXTS[3:])):
        table = pyarrow.table({"text": part, "id": list(range(len(part)))})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet", row_group_size=2)
    source = SourceConfig(str(tmp_path), "parquet")
    assert texts_of(source) == TEXTS
    documents = open_documents(source)
    assert [documents[i].text for i in (3, 0, 2, 1)] == [TEXTS[i] for i in (3, 0, 2, 1)]
    with pytest.raises(ValueError, match=r"a.parquet: no column 'body'"):
        open_documents(SourceConfig(str(tmp_path), "parquet", text_field="body"))


def test_bad_parquet_is_named(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "a.parquet")
    documents = open_documents(SourceConfig(str(tmp_path), "parquet"))
    with pytest.raises(ValueError, match=r"a.parquet:row 1 of row group 0: column 'text' is null"):
        documents[1]
    (tmp_path / "b.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match=r"b.parquet: not a Parquet file"):
        open_documents(SourceConfig(str(tmp_path), "parquet"))


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r'pip install "dsjax\[parquet\]"'):
        open_documents(SourceConfig(str(tmp_path), "parquet"))


def test_nothing_there_is_said_in_one_line(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    with pytest.raises(ValueError, match=f"source.path='{missing}' must be a folder or a file"):
        open_documents(SourceConfig(missing, "text"))
    with pytest.raises(ValueError, match=r"is empty: no file matches '\*\*/\*.jsonl'"):
        open_documents(SourceConfig(str(tmp_path), "jsonl"))
    (tmp_path / "a.jsonl").write_text("\n\n")
    (tmp_path / "a.txt").write_text("")
    for kind in ("jsonl", "text"):
        with pytest.raises(ValueError, match="is empty: no document in 1 files"):
            open_documents(SourceConfig(str(tmp_path), kind))
    with pytest.raises(ValueError, match="format='arrayrecord' must be one of"):
        open_documents(SourceConfig(str(tmp_path), "arrayrecord"))
