"""A run's picture: which panels it has, what they hold, and what is wrong is one line."""

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dsjax.config import TokenDropping, TrainConfig
from dsjax.config.run_file import write_run_file
from dsjax.training.picture import draw_run, read_metrics
from tests.dsjax.training.small_runs import small_run
from tests.small_models import LOSS

ROOT = Path(__file__).resolve().parents[3]


def lines_of(axes) -> dict[str, np.ndarray]:
    return {line.get_label(): np.asarray(line.get_xydata()) for line in axes.lines}


def panels(figure) -> dict:
    return {axes.get_title().split(",")[0].split(":")[0]: axes for axes in figure.axes}


def some_lines(num_steps: int = 20) -> list[dict]:
    rows: list[dict] = [
        {
            "step": step,
            "cross_entropy": 5 - step / 10,
            "gradient_norm": 2.0,
            "learning_rate": 1e-3,
            "batch_size": 8 if step < 10 else 16,
            "tokens": 1000 * step,
            "tokens_per_second": 1e5,
            "mfu": 0.4,
            "load_imbalance": 2.0,
            "device_load_imbalance": 1.5,
            "expert_load": [[0.5, 0.25, 0.25, 0.0]],
            "router_entropy": 1.2,
            "dropped_share": 0.25,
            "skipped": "",
        }
        for step in range(1, num_steps + 1)
    ]
    rows[4] |= {"cross_entropy": None, "skipped": "the loss is not finite"}
    rows.insert(10, {"step": 10, "eval_bits_per_byte": 2.5})
    return rows


def test_what_a_run_says_is_drawn(tmp_path: Path):
    dropping = replace(LOSS, dropping=TokenDropping())
    config = replace(small_run(tmp_path, tmp_path / "held_out"), loss=dropping)
    figure = draw_run(some_lines(), config)
    drawn = panels(figure)
    loss = lines_of(drawn["Training loss"])
    assert len(loss["single steps"]) == 19  # NaN is no point of a curve
    assert loss["1 skipped"].tolist() == [[5, 3.0]]
    assert lines_of(drawn["Gradient norm"])["clipped to 1"][0, 1] == 1
    assert "median 100,000" in lines_of(drawn["Speed"])
    np.testing.assert_array_equal(
        drawn["Load of each expert"].images[0].get_array(), [[2, 1, 1, 0]]
    )
    (held_out,) = (axes for title, axes in drawn.items() if title.startswith("Held out"))
    assert held_out.get_title().endswith("held_out")
    assert lines_of(held_out)["model"].tolist() == [[10, 2.5]]
    assert np.all(drawn["Dropped assignments"].lines[0].get_ydata() == 25)
    assert "Entropy of the routers" in drawn
    (batches,) = (axes for axes in figure.axes if axes.get_ylabel() == "sequences a step")
    np.testing.assert_array_equal(batches.lines[0].get_ydata(), [8] * 9 + [16] * 11)


def test_what_it_does_not_say_has_no_panel(tmp_path: Path):
    kept = ("step", "cross_entropy", "gradient_norm")
    rows = [{name: row[name] for name in kept if name in row} for row in some_lines()]
    drawn = panels(draw_run(rows, small_run(tmp_path, tmp_path)))
    assert set(drawn) == {"Training loss", "Gradient norm"}
    with pytest.raises(ValueError, match=r"metrics\.jsonl: holds no figures of a step yet"):
        draw_run([{"step": 1, "eval_bits_per_byte": 2.0}], small_run(tmp_path, tmp_path))


def test_the_script_draws_a_run_that_is_going_on(
    trained_run: TrainConfig, tmp_path: Path, monkeypatch, capsys
):
    run = tmp_path / "run"
    run.mkdir()
    write_run_file(run, trained_run)
    written = (Path(trained_run.directory) / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(b"\0\0\n" + written + b'{"step": 7, "lo')
    assert read_metrics(run) == [json.loads(line) for line in written.splitlines()]
    monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])
    monkeypatch.setattr(sys, "argv", ["plot_run.py", str(run)])
    runpy.run_path(str(ROOT / "scripts" / "plot_run.py"), run_name="__main__")
    assert capsys.readouterr().out.strip() == str(run / "run.png")
    assert (run / "run.png").read_bytes().startswith(b"\x89PNG")
