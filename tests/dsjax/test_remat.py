"""What each remat policy runs again, counted over the loops of a training step."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.dsjax.remat_runs import LAYERS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def runs():
    command = [sys.executable, "-m", "tests.dsjax.remat_runs"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


# Gate and up are one kernel, down another; each of the two has one more product for its gradient.
@pytest.mark.parametrize(
    ("policy", "attention", "swiglu", "products"),
    [
        ("none", 1, 1, 3),
        ("full", 2, 2, 4),
        ("save_attention", 1, 2, 4),
        ("save_dots", 1, 1, 3),
    ],
)
def test_kernels_run_as_often_as_the_policy_says(runs, policy, attention, swiglu, products):
    found = runs[policy]
    assert found["mla_attention_forward"] == attention * LAYERS
    assert found["mla_attention_backward"] == LAYERS
    assert found["grouped_swiglu"] == swiglu * (LAYERS - 1)
    assert found["grouped_matmul"] == products * (LAYERS - 1)
