"""Scripts that a person runs: what is wrong with an option is one line."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quickstart.py", "--steps=-1"], "--steps: must be at least 1"),
        (["quickstart.py", "--corpus-bytes=-5"], "--corpus-bytes: must be at least 0"),
    ],
)
def test_wrong_options_are_one_line(arguments, message, tmp_path):
    script, *rest = arguments
    ended = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / script), *rest],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert message in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr
    assert not list(tmp_path.iterdir())
