"""Files that are whole or not there, and JSON with the file named in every error."""

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dsjax.files import (
    LockHeldError,
    copy_file,
    draft_of,
    locked,
    read_json,
    write_bytes,
    write_json,
    write_text,
)

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


def test_a_lock_is_refused_with_its_holder_and_ends_with_it(tmp_path: Path):
    path = tmp_path / "run.lock"
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom dsjax.files import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "held\n"
            holder = f"process {other.pid} on {socket.gethostname()} since 2"
            with pytest.raises(LockHeldError, match=holder), locked(path):
                pass
        finally:
            other.kill()
    here = f"process {os.getpid()} on "
    with locked(path), pytest.raises(LockHeldError, match=here), locked(path):
        pass
    with locked(path):
        pass
