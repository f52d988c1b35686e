"""Files that are whole or not there, and JSON with the file named in every error."""

import errno
import os
from pathlib import Path

import pytest

from dsjax.files import copy_file, draft_of, read_json, write_bytes, write_json, write_text

pytestmark = pytest.mark.core


def test_what_is_written_is_read(tmp_path: Path):
    write_json(tmp_path / "a.json", {"é": [1, None]})
    assert read_json(tmp_path / "a.json") == {"é": [1, None]}
    write_text(tmp_path / "a.json", "{}")
    assert read_json(tmp_path / "a.json") == {}
    copy_file(tmp_path / "a.json", tmp_path / "b.json")
    assert (tmp_path / "b.json").read_bytes() == b"{}"
    assert sorted(os.listdir(tmp_path)) == ["a.json", "b.json"]


def test_a_body_that_fails_leaves_the_old_file_and_no_draft(tmp_path: Path):
    write_bytes(tmp_path / "a", b"old")
    with pytest.raises(ZeroDivisionError), draft_of(tmp_path / "a") as draft:
        draft.write_bytes(b"half") // 0
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_an_error_of_the_system_names_the_file(tmp_path: Path):
    with (
        pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}/a'"),
        draft_of(tmp_path / "a"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(FileNotFoundError, match=f"'{tmp_path}/none/a'"):
        write_text(tmp_path / "none" / "a", "")
    with pytest.raises(FileNotFoundError, match=f"'{tmp_path}/none'"):
        copy_file(tmp_path / "none", tmp_path / "a")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a":\n 1,}', "a.json:2: not JSON: "),
        (b"[]", "a.json: holds a list, not an object"),
        (b'{"a": "\xff"}', "a.json: not UTF-8: invalid start byte at byte 7"),
    ],
)
def test_what_is_no_json_object_is_named(content: bytes, message: str, tmp_path: Path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_json(tmp_path / "a.json")
