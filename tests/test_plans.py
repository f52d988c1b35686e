"""The table of plans has every run, and only figures of the runs as they are."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from dsjax.config import TrainConfig
from dsjax.config.load import load_config, named_configs
from tests.tpu_compiler import ROOT

DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    """What scripts/plan_runs.py defines."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        return runpy.run_path(str(ROOT / "scripts" / "plan_runs.py"))
    finally:
        sys.path.remove(str(ROOT / "scripts"))


@pytest.fixture(scope="module")
def plans() -> dict[str, Any]:
    return json.loads((DOCS / "plans.json").read_text(encoding="utf-8"))


def test_every_run_has_a_row(script):
    files = {path.stem for path in (ROOT / "configs" / "runs").glob("*.py")}
    assert set(script["RUNS"]) == files
    assert files == {name for name in map(stem, named_configs()) if is_run(name)}
    rows = [line for line in table() if line.startswith("| `")]
    assert sorted(row.split("`")[1] for row in rows) == sorted(files)


def stem(name: str) -> str:
    return Path(name).stem


def is_run(name: str) -> bool:
    return isinstance(load_config(name), TrainConfig)


def table() -> list[str]:
    return (DOCS / "plans.md").read_text(encoding="utf-8").splitlines()


def test_it_is_what_the_script_writes_of_the_plans_that_are_kept(script, plans):
    """Where a run or the script changed: `python scripts/plan_runs.py`, which compiles nothing."""
    assert script["table"](plans).splitlines() == table()


def test_a_run_that_changed_shows_no_figures(script, plans):
    run = load_config("quickstart")
    assert plans["quickstart"]["of"] == script["planned_by"](run)
    changed = json.loads(json.dumps(plans["quickstart"]))
    changed["of"]["batch"]["size"] = 16
    before, after = (
        next(line for line in script["table"](kept).splitlines() if "`quickstart`" in line)
        for kept in (plans, plans | {"quickstart": changed})
    )
    assert before.count("–") == 0
    assert after.count("–") == 9
