"""Config files as a person writes them: what is wrong is named with the file and its line."""

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsjax.config import BatchConfig, ModelConfig, RuntimeConfig, TrainConfig
from dsjax.config.load import load_config, load_recipe, load_train_config
from dsjax.configs.models import tiny
from dsjax.configs.runs import quickstart

HEAD = "from dataclasses import replace\nfrom dsjax.configs.models import tiny\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def x(:\n", ":1: SyntaxError: invalid syntax"),
        ("import os\nimport not_there\n", ":2: ModuleNotFoundError: No module named 'not_there'"),
        ("\n\n1 / 0\n", ":3: ZeroDivisionError: division by zero"),
        ("config = {}['model']\n", ":1: KeyError: 'model'"),
        ("import sys\nsys.exit(3)\n", ":2: SystemExit: 3"),
        (HEAD + "config = replace(tiny.config, layers=3)\n", ":3: TypeError: "),
        (
            HEAD + "config = replace(tiny.config,\n  num_layers=-1)\n",
            ":3: model.num_layers=-1: must",
        ),
        (
            HEAD + "config = replace(tiny.config, num_layers='3')\n",
            ":3: ModelConfig.num_layers='3'",
        ),
        ("\0", ": SyntaxError: "),
        ("config = 3\n", ": must bind `config` to a ModelConfig or TrainConfig"),
        ("", ": must bind `config` to a ModelConfig or TrainConfig"),
    ],
)
def test_what_is_wrong_in_a_file_is_one_line_with_its_place(
    tmp_path: Path, text: str, message: str
):
    file = tmp_path / "config.py"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"config\.py") as refused:
        load_config(file)
    assert str(refused.value).startswith(f"{file}{message}")
    assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match=r"config\.py"):
        load_recipe(file)


@pytest.mark.parametrize("kind", [ModelConfig, TrainConfig, RuntimeConfig])
def test_no_field_takes_a_value_of_another_type(kind):
    """Of every field at any depth: an object that nothing declares is refused by its name."""
    made = {ModelConfig: tiny.config, TrainConfig: quickstart.config}.get(kind, RuntimeConfig())

    def fields_of(config) -> int:
        count = 0
        for field in dataclasses.fields(config):
            with pytest.raises(ValueError, match=f"^{type(config).__name__}.{field.name}=<object"):
                replace(config, **{field.name: object()})
            value = getattr(config, field.name)
            count += 1 + (fields_of(value) if dataclasses.is_dataclass(value) else 0)
        return count

    assert fields_of(made) > 5


def test_what_means_the_same_becomes_the_same():
    sources: Any = list(quickstart.config.data.sources)
    others: dict[str, Any] = {"directory": Path("quickstart_output") / "run"}
    others |= {"num_steps": np.int64(500), "data": replace(quickstart.config.data, sources=sources)}
    size: Any = 8.0
    made = replace(quickstart.config, batch=BatchConfig(size=size), **others)
    assert made == quickstart.config
    assert hash(made) == hash(quickstart.config)
    assert repr(made) == repr(quickstart.config)
    wrong: Any
    for wrong in (True, 2.5, "8", None):
        with pytest.raises(ValueError, match=r"BatchConfig\.size=.*: must be int, not "):
            replace(quickstart.config.batch, size=wrong)


def test_a_folder_that_is_no_model_says_what_it_is(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"is a folder \(without config.json\)"):
        load_train_config(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"is a folder \(a run, which goes on by its name"):
        load_train_config(tmp_path)
    with pytest.raises(FileNotFoundError, match="'': names no config"):
        load_train_config("")
    with pytest.raises(ValueError, match="override '=3': must be FIELD=VALUE"):
        load_config("tiny", ["=3"])
