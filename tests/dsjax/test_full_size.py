"""The whole 236B training step, compiled for a pod of 64 chips by the TPU's own compiler."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import require_module
from tests.released_models import SIZES
from tests.tpu_compiler import run_compiler

SNAPSHOT = Path(__file__).with_name("full_size_collectives.json")


@pytest.mark.slow
@pytest.mark.tpu_program
def test_the_236b_step_compiles_for_64_chips_and_fits():
    require_module("libtpu")
    (found,) = run_compiler("tests.dsjax.full_size_program")
    assert found["chips"] == 64
    # Parameters in bfloat16 and two float32 moments, 10 bytes each, divided evenly.
    assert 0.99 < found["arguments"] * 64 / (SIZES["deepseek_v2"].parameters * 10) < 1.02
    assert found["peak"] < 80 * 2**30
    # What its compiling takes goes with its size: 15,268 lines, and 610 CPU seconds with them. The
    # layers of a stack are written once; a step that wrote out all 60 would have many times these.
    assert found["lines"] < 20_000
    # To renew it: write what was found there, and look at what changed and why.
    snapshot = json.loads(SNAPSHOT.read_text(encoding="utf-8"))
    if importlib.metadata.version("libtpu") == snapshot["libtpu"]:
        assert found["collectives"] == snapshot["collectives"]
    else:  # another compiler may cut them up otherwise, but not send a tenth more
        assert sent_bytes(found) < 1.1 * sent_bytes(snapshot)


def sent_bytes(program: dict) -> int:
    return sum(use["bytes"] for use in program["collectives"].values())


@pytest.mark.slow
def test_the_script_says_what_a_step_needs(repository):
    if os.environ.get("DSJAX_TEST_COMPILE") != "all":
        pytest.skip(
            "compiles half a minute for what the test above compiles; in scripts/test --all"
        )
    require_module("libtpu")
    command = ["scripts/compile_train_step.py", "tiny", "v5e:2x2", "num_layers=2"]
    options = ["--mesh=fsdp=2,expert=2", "--length=256"]
    done = subprocess.run(
        [sys.executable, *command, *options],
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["chips"], found["mesh"]) == (4, "fsdp=2,expert=2")
    assert found["cpu_seconds"] > 0
    assert any(name.startswith("ragged-all-to-all") for name in found["collectives"])
