"""A run that goes on with other data: refused by the field's name, or done where asked for."""

import shutil
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from dsjax.config import TrainConfig
from dsjax.training.loop import fit
from tests.dsjax.training.small_runs import LENGTH


@pytest.fixture
def half(trained_run: TrainConfig, tmp_path: Path) -> TrainConfig:
    """The trained run after four of its steps."""
    shutil.copytree(trained_run.directory, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    return replace(trained_run, directory=str(tmp_path / "run"))


def changed(config: TrainConfig, **fields) -> TrainConfig:
    (source,) = config.data.sources
    if "weight" in fields:
        fields["sources"] = (replace(source, weight=fields.pop("weight")),)
    if "count" in fields:
        fields["sources"] = (source,) * fields.pop("count")
    return replace(config, data=replace(config.data, **fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seed": 3}, "data.seed=0, not 3"),
        ({"length": LENGTH // 2}, f"data.length={LENGTH}, not {LENGTH // 2}"),
        ({"weight": 0.5}, r"data.sources\[0\].weight=1.0, not 0.5"),
        ({"count": 2}, "1 data.sources, not 2"),
        ({"num_workers": 1}, "data.num_workers=0, not 1"),
    ],
)
def test_other_data_are_refused_by_the_name_of_the_field(half: TrainConfig, fields, message):
    with pytest.raises(ValueError, match=message):
        fit(changed(half, **fields), devices=jax.devices()[:1])


def test_a_run_goes_on_with_other_data_where_asked_to(half: TrainConfig, caplog):
    again = fit(changed(half, count=2, on_change="restart"), devices=jax.devices()[:1])
    assert again.step == 6
    assert "1 data.sources, not 2" in caplog.text


def test_a_place_that_does_not_fit_the_new_data_is_one_line(half: TrainConfig):
    with pytest.raises(ValueError, match="data: the checkpoint's place is of another pipeline"):
        fit(changed(half, count=2, on_change="keep"), devices=jax.devices()[:1])


def test_a_run_keeps_its_place_in_other_data_where_asked_to(half: TrainConfig, caplog):
    again = fit(changed(half, seed=3, on_change="keep"), devices=jax.devices()[:1])
    assert again.step == 6
    assert "data.seed=0, not 3" in caplog.text
    assert "on_change=keep" in caplog.text
