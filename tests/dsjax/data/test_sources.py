"""Sources of documents: what they hold, and what they say of damaged input."""

import gzip
import json
import pickle
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from dsjax.config.data import SourceConfig
from dsjax.data.find_files import infer_format
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
    assert (document.text, document.intact) == ("a\ufffdb", False)


def test_linked_folders_are_followed_once_and_sidecars_left_out(tmp_path: Path, caplog) -> None:
    corpus, other = tmp_path / "corpus", tmp_path / "other"
    (corpus / "sub").mkdir(parents=True)
    (other / "deep").mkdir(parents=True)
    for file in (corpus / "a.txt", corpus / "sub/b.txt", other / "deep/c.txt", corpus / "._a.txt"):
        file.write_text(file.name)
    (corpus / "linked").symlink_to(other)
    (corpus / "again").symlink_to(corpus / "sub")  # reached by its own name already
    (other / "loop").symlink_to(corpus)
    (corpus / "gone.txt").symlink_to(tmp_path / "nothing")
    assert texts_of(SourceConfig(str(corpus), "text")) == ["a.txt", "c.txt", "b.txt"]
    assert "gone.txt: a link to nothing" in caplog.text


def test_compressed_files_are_read_through(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    with pyarrow.output_stream(str(tmp_path / "b.jsonl.zst"), compression="zstd") as stream:
        stream.write(lines)
    assert texts_of(SourceConfig(str(tmp_path), "jsonl")) == 2 * TEXTS
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"text"))
    assert texts_of(SourceConfig(str(tmp_path), "text")) == ["text"]
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"text" * 99)[:-9])
    with pytest.raises(ValueError, match=r"c.txt.gz: damaged compressed file"):
        texts_of(SourceConfig(str(tmp_path), "text"))


def test_the_format_is_told_by_suffix_and_first_bytes(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "x.data")
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}'))
    (tmp_path / "README").write_text("text")
    found = [infer_format(tmp_path / name) for name in ("x.data", "x.jsonl.gz", "README")]
    assert found == ["parquet", "jsonl", "text"]
    assert infer_format(tmp_path) == "jsonl"
    (tmp_path / "y.txt").write_text("text")
    with pytest.raises(ValueError, match="name the format"):
        infer_format(tmp_path)
    for data in (b"PK\x03\x04zip", "text".encode("utf-16"), b"\x7fELF\0\0", b"%PDF-1.7"):
        (tmp_path / "binary").write_bytes(data)
        with pytest.raises(ValueError, match="binary: "):
            infer_format(tmp_path / "binary")


def test_what_is_no_text_is_refused_as_text(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet: a Parquet file, not UTF-8 text"):
        open_documents(SourceConfig(str(tmp_path / "a.parquet"), "text"))[0]
    with pytest.raises(ValueError, match=r"a.parquet: a Parquet file"):
        open_documents(SourceConfig(str(tmp_path / "a.parquet"), "jsonl"))


def test_a_byte_order_mark_and_blank_lines_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbftext")
    assert texts_of(SourceConfig(str(tmp_path), "text")) == ["text"]
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n   \n\t\r\n{"text": "two"}')
    assert [t for t in texts_of(SourceConfig(str(tmp_path), "jsonl")) if t] == ["one", "two"]


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
