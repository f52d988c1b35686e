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


# Nine of a layer's experts run whatever the policy. "full" runs SwiGLU, the product with `down` and
# the gather of rows again, "save_dots" the gather alone.
@pytest.mark.parametrize(
    ("policy", "attention", "experts"),
    [("none", 1, 9), ("full", 2, 12), ("save_attention", 1, 12), ("save_dots", 1, 10)],
)
def test_kernels_run_as_often_as_the_policy_says(runs, policy, attention, experts):
    found = runs[policy]
    assert found["mla_attention_forward"] == attention * LAYERS
    assert found["mla_attention_backward"] == LAYERS
    assert found["experts"] == experts * (LAYERS - 1)
