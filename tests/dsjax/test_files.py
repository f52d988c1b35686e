"""Files that are whole or not there, and JSON with the file named in every error."""

import errno
import fcntl
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

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


def test_a_lock_on_a_file_that_its_holder_removed_is_taken_anew(tmp_path: Path, monkeypatch):
    """A run that did not begin removes its folder and the lock in it, maybe in this very moment."""
    path, flock = tmp_path / "lock", fcntl.flock

    def removed_first(file: Any, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        path.unlink()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", removed_first)
    with locked(path):
        assert path.read_text().startswith(f"process {os.getpid()} on ")
        with pytest.raises(LockHeldError), locked(path):
            pass


def test_a_lock_file_of_rubbish_is_one_line(tmp_path: Path):
    path = tmp_path / "lock"
    with locked(path):
        path.write_bytes(bytes(40) + b"\xff\nprocess")
        with pytest.raises(LockHeldError, match=r"in use by \ufffd process$"), locked(path):
            pass
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=r"folder'$"), locked(tmp_path / "folder"):
        pass
