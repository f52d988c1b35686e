"""The notebook runs top to bottom, and the quickstart it shares its steps with."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_every_cell_runs_and_runs_again(tmp_path, monkeypatch):
    monkeypatch.setenv("DSJAX_NOTEBOOK_STEPS", "24")
    monkeypatch.setenv("DSJAX_NOTEBOOK_BYTES", "600000")
    monkeypatch.setenv("DSJAX_NOTEBOOK_OUTPUT", str(tmp_path))
    monkeypatch.setenv("DSJAX_CHECKOUT", str(ROOT))
    monkeypatch.setenv("XLA_FLAGS", "")
    notebook = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", as_version=4)
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": ROOT}})
    printed = ["", ""]
    with client.setup_kernel():
        for index, cell in enumerate(notebook.cells):
            for time in range(2 if cell.cell_type == "code" else 0):
                client.execute_cell(cell, index)
                printed[time] += "".join(output.get("text", "") for output in cell.outputs)
    assert "finished: False" in printed[0], "the SIGTERM did not stop the first run"
    for text in printed:
        assert "step 24, held-out bits per byte" in text
    assert (tmp_path / "hf" / "model.safetensors").exists()


@pytest.mark.slow
def test_quickstart_from_corpus_to_text(tmp_path):
    output = tmp_path / "out"
    command = [sys.executable, "scripts/quickstart.py", "--output", str(output)]
    result = subprocess.run(
        [*command, "--steps", "24", "--corpus-bytes", "600000"],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "stopped by a signal" in result.stderr
    assert "resumed at step" in result.stderr
    rows = [json.loads(line) for line in (output / "run/metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0] - 0.5
    assert (output / "curve.png").stat().st_size > 10_000
    assert "xz -9 on the same files" in result.stdout
    assert json.loads((output / "hf/config.json").read_text())["model_type"] == "deepseek_v2"
