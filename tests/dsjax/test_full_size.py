"""The whole 236B training step, compiled for a pod of 64 chips by the TPU's own compiler."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import require_module

ROOT = Path(__file__).resolve().parents[2]
SNAPSHOT = Path(__file__).with_name("full_size_collectives.json")


@pytest.mark.slow
def test_the_236b_step_compiles_for_64_chips_and_fits():
    require_module("libtpu")
    command = [
        sys.executable,
        "scripts/compile_train_step.py",
        "configs/models/deepseek_v2.py",
        "v5p:4x4x4",
        "--mesh=fsdp=8,expert=8",
        "runtime.param_dtype=bfloat16",
    ]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=1800
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["chips"] == 64
    # Parameters in bfloat16 and two float32 moments, 10 bytes each, divided evenly.
    assert 0.99 < found["argument_gib"] * 2**30 * 64 / (235741434880 * 10) < 1.02
    assert found["peak_gib"] < 80
    # 611 where two idle cores took 334 seconds; the wall clock would judge what else they do.
    assert found["cpu_seconds"] < 1000
    # To renew it: write what was found there, and look at what changed and why.
    snapshot = json.loads(SNAPSHOT.read_text(encoding="utf-8"))
    if importlib.metadata.version("libtpu") == snapshot["libtpu"]:
        assert found["collectives"] == snapshot["collectives"]
    else:  # another compiler may cut them up otherwise, but not send a tenth more
        assert sent_bytes(found) < 1.1 * sent_bytes(snapshot)


def sent_bytes(program: dict) -> int:
    return sum(use["bytes"] for use in program["collectives"].values())
