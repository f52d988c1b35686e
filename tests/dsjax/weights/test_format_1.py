"""A run and a converted model that an older version wrote still load, export and resume.

`format_1.tar.xz` holds them (checkpoints, `run.json` and `dsjax.json` of format 1) beside what that
version computed from them.
"""

import hashlib
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsjax
from dsjax.config.run_file import read_run_file
from dsjax.training.loop import fit
from dsjax.weights.convert import convert
from tests.dsjax.training.small_runs import losses
from tests.small_models import RUNTIME

ARCHIVE = Path(__file__).with_name("format_1.tar.xz")


@pytest.fixture
def old(tmp_path, monkeypatch) -> Path:
    """The archive's files, in the current folder as they were when they were written."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def expected(old) -> dict:
    return json.loads((old / "expected.json").read_text())


@pytest.mark.core
@pytest.mark.parametrize("place", ["run", "model"])
def test_an_old_checkpoint_loads(old, expected, place):
    model = dsjax.load(place, dtype="float32")
    tokens = jnp.arange(48, dtype=jnp.int32)[None] % 250
    np.testing.assert_allclose(model(tokens)[0, -1], expected["logits"], atol=2e-6)


def test_an_old_checkpoint_exports_to_the_same_files(old, expected):
    convert("model", "hf", progress=False)
    found = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in Path("hf").iterdir()
    }
    # But for the tokenizer, which lets other software put BOS first now.
    differing = {
        name for name, digest in found.items() if expected["hf_sha256"].get(name) != digest
    }
    assert found.keys() == expected["hf_sha256"].keys()
    assert differing == {"tokenizer.json"}
    now, before = (
        json.loads((folder / "tokenizer.json").read_text())
        for folder in (Path("hf"), Path("model/hf"))
    )
    assert now["post_processor"]["type"] == "TemplateProcessing"
    assert now == before | {"post_processor": now["post_processor"]}


def test_an_old_run_goes_on(old, expected):
    config = read_run_file(Path("run"))
    assert config.runtime == replace(RUNTIME, kernels=config.runtime.kernels)
    result = fit(config, devices=jax.devices()[:1])
    assert (result.step, result.finished) == (12, True)
    found = losses(Path("run"))
    assert found.keys() == set(range(1, 13))
    for step, loss in expected["losses"].items():
        assert found[int(step)] == pytest.approx(loss, rel=1e-5), step
