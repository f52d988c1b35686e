"""Whole training steps, compiled for pods by the TPU's own compiler, or found unchanged."""

import importlib.metadata
import json
from pathlib import Path

import pytest

from tests.conftest import require_module
from tests.released_models import SIZES
from tests.tpu_compiler import run_compiler

SNAPSHOT = Path(__file__).with_name("full_size_collectives.json")


# Of state a parameter: bfloat16 with two moments of float32, or of bfloat16.
@pytest.mark.slow
@pytest.mark.tpu_program
@pytest.mark.parametrize(
    ("run", "topology", "chips", "model", "state", "most"),
    [
        ("v2_v5p_64", "v5p:4x4x4", 64, "deepseek_v2", 10, 80),
        ("v2_lite_v5e_16", "v5e:4x4", 16, "deepseek_v2_lite", 6, 15.75),
    ],
)
def test_a_run_compiles_for_its_pod_and_needs_and_sends_what_it_did(
    run, topology, chips, model, state, most
):
    require_module("libtpu")
    (found,) = run_compiler("tests.dsjax.full_size_program", run, topology)
    assert found["chips"] == chips
    assert 0.99 < found["arguments"] * chips / (SIZES[model].parameters * state) < 1.02
    assert found["peak"] < most * 2**30
    # What its compiling takes goes with its size: 15,268 lines, and 610 CPU seconds with them. The
    # layers of a stack are written once; a step that wrote out all 60 would have many times these.
    assert found["lines"] < 20_000
    # To renew it: write what was found there, and look at what changed and why.
    snapshot = json.loads(SNAPSHOT.read_text(encoding="utf-8"))
    before = snapshot["runs"][run]
    assert found["peak"] <= 1.02 * before["peak"]
    if importlib.metadata.version("libtpu") == snapshot["libtpu"]:
        assert found["collectives"] == before["collectives"]
    else:  # another compiler may cut them up otherwise, but not send a tenth more
        assert sent_bytes(found) < 1.1 * sent_bytes(before)


def sent_bytes(program: dict) -> int:
    return sum(use["bytes"] for use in program["collectives"].values())
