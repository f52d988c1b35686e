"""Where figures go: JSON lines, TensorBoard, Weights & Biases."""

import json
import sys
import types
from pathlib import Path

import pytest

from dsjax.config import LogConfig
from dsjax.training.metrics import MetricsWriter

pytestmark = pytest.mark.core


def lines(folder: Path) -> list[dict]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_a_line_is_there_as_soon_as_it_is_written(tmp_path: Path):
    with MetricsWriter(tmp_path, LogConfig(), {}) as metrics:
        metrics.write(1, {"loss": 0.5, "expert_load": [[0.25, 0.75]], "skipped": ""})
        assert lines(tmp_path) == [
            {"step": 1, "loss": 0.5, "expert_load": [[0.25, 0.75]], "skipped": ""}
        ]


def test_what_is_not_finite_is_null(tmp_path: Path):
    with MetricsWriter(tmp_path, LogConfig(), {}) as metrics:
        metrics.write(1, {"loss": float("nan"), "gradient_norm": float("inf")})
    assert lines(tmp_path) == [{"step": 1, "loss": None, "gradient_norm": None}]


def test_going_on_drops_the_steps_that_come_again_and_a_torn_line(tmp_path: Path):
    with MetricsWriter(tmp_path, LogConfig(), {}) as metrics:
        for step in range(1, 6):
            metrics.write(step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 6, "lo')  # a kill in the middle of a line
    with MetricsWriter(tmp_path, LogConfig(), {}, start=3) as metrics:
        metrics.write(4, {"loss": 40.0})
    assert lines(tmp_path) == [
        *({"step": step, "loss": float(step)} for step in (1, 2, 3)),
        {"step": 4, "loss": 40.0},
    ]


@pytest.mark.parametrize(
    ("config", "package", "message"),
    [
        (
            LogConfig(tensorboard=True),
            "tensorboardX",
            r"^log.tensorboard=True: needs tensorboardX; pip install 'dsjax\[tensorboard\]'$",
        ),
        (
            LogConfig(wandb_project="p"),
            "wandb",
            r"^log.wandb_project='p': needs wandb; pip install 'dsjax\[wandb\]'$",
        ),
    ],
)
def test_a_missing_package_names_the_extra(monkeypatch, tmp_path, config, package, message):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=message):
        MetricsWriter(tmp_path, config, {})


class FakeWandb(types.ModuleType):
    """Takes down what it is told."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.begun: list[dict] = []
        self.logged: list[tuple[int, dict]] = []
        self.finished = 0

    def init(self, **arguments) -> "FakeWandb":
        self.begun.append(arguments)
        return self

    def log(self, figures: dict, step: int) -> None:
        self.logged.append((step, figures))

    def finish(self) -> None:
        self.finished += 1


def test_weights_and_biases_gets_the_scalars_of_one_run(monkeypatch, tmp_path: Path):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for start in (0, 1):
        with MetricsWriter(tmp_path, LogConfig(wandb_project="p"), {"a": 1}, start) as metrics:
            metrics.write(start + 1, {"loss": 0.5, "expert_load": [[1.0]], "skipped": ""})
    assert wandb.logged == [(1, {"loss": 0.5}), (2, {"loss": 0.5})]
    assert wandb.finished == 2
    first, second = wandb.begun
    assert first == second  # the same id: the restarted run goes on in the same place
    assert (first["project"], first["config"], first["resume"]) == ("p", {"a": 1}, "allow")
    assert len(first["id"]) == 16


@pytest.mark.parametrize("line", [b"\0" * 60, b'{"step": 2, "lo', b"[1]", b"7", b"\xff{}", b"{}"])
def test_a_damaged_line_is_dropped_and_said(tmp_path: Path, caplog, line: bytes):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n{"step": 3}\n')
    with MetricsWriter(tmp_path, LogConfig(), {}, start=2):
        assert lines(tmp_path) == [{"step": 1}, {"step": 2}]
    assert f"{path}: 1 damaged lines were dropped" in caplog.text
