"""The command line: what it prints, and one line with exit code 2 for what a user can mend."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer

import dsjax as dsjax_package
from dsjax.cli import app, main
from dsjax.config import BatchConfig, MeshConfig, TrainConfig
from dsjax.kernels import _choose
from tests.dsjax.training.small_runs import MODEL, REPOSITORY, small_run, write_run
from tests.released_models import SIZES


@pytest.fixture
def dsjax(monkeypatch, capsys):
    """Runs a command in this process; returns exit code, standard output and standard error."""
    monkeypatch.chdir(REPOSITORY)

    def call(*arguments: object) -> tuple[int | str, str, str]:
        monkeypatch.setattr(sys, "argv", ["dsjax", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        return exit_.value.code or 0, captured.out, captured.err

    return call


@pytest.mark.core
@pytest.mark.parametrize("name", SIZES)
def test_info_prints_the_exact_figures(dsjax, name: str):
    code, out, _ = dsjax("info", name, "--json")
    assert code == 0
    figures = json.loads(out)
    names = ("parameters", "active_parameters", "hf_tensors", "latent_cache_bytes_per_token")
    assert tuple(figures[name] for name in names) == SIZES[name]
    assert figures["full_cache_bytes_per_token"] > 8 * figures["latent_cache_bytes_per_token"]
    assert figures["train_flops_per_token"] > 6 * (figures["active_parameters"] - 10**9)


# What training imports and `dsjax info` must not wait for.
TRAINING_IMPORTS = {"array_record", "grain", "orbax", "tensorstore", "dsjax.training"}
IMPORTED = f"""
import sys
from dsjax.cli import app, main
sys.argv = ["dsjax", "info", "tiny"]
try:
    main()
except SystemExit:
    print(sorted({TRAINING_IMPORTS} & set(sys.modules)))
import dsjax.api
print(sorted({TRAINING_IMPORTS} & set(sys.modules)))
"""


@pytest.mark.core
def test_info_imports_nothing_of_training():
    run = [sys.executable, "-c", IMPORTED]
    out = subprocess.run(run, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    with_info, with_training = out.splitlines()[-2:]
    assert with_info == "[]"
    assert with_training == str(sorted(TRAINING_IMPORTS))


def test_info_as_a_table_and_with_overrides(dsjax):
    code, out, _ = dsjax("info", "configs/models/tiny.py", "moe.top_k=2", "--length", "512")
    assert code == 0
    rows = dict(line.split() for line in out.splitlines()[1:])
    assert rows["train_length"] == "512"
    assert rows["latent_cache_bytes_per_token"] == f"{4 * (64 + 16) * 2:,}"


def write(config: TrainConfig, folder: Path, source: str = "") -> Path:
    path = write_run(config, folder / "run.py")
    return path


@pytest.fixture
def errors(dsjax, corpus, tmp_path: Path):
    """Runs `dsjax train` on a run that must be refused; returns the one line."""

    def call(config: TrainConfig | None = None, *overrides: str) -> str:
        config = config or small_run(tmp_path / "run", corpus)
        code, out, err = dsjax("train", write_run(config, tmp_path / "run.py"), *overrides)
        lines = [line for line in err.splitlines() if not line.startswith("kernels on ")]
        assert code == 2, err
        assert out == ""
        assert len(lines) == 1, err
        return lines[0]

    return call


@pytest.mark.core
def test_unknown_keys_name_the_nearest(errors):
    assert errors(None, "model.moe.topk=2") == (
        "error: model.moe.topk: no such config field; did you mean model.moe.top_k?"
    )
    assert "must be FIELD=VALUE" in errors(None, "model.moe.top_k")
    assert errors(None, "num_steps=many").startswith("error: num_steps=many: must be int")


@pytest.mark.core
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.moe.num_groups=3", "moe.num_groups=3: must divide moe.num_experts=8"),
        ("model.moe.top_k=5", "moe.top_k=5: must not exceed the 4 experts"),
        ("model.attention.qk_rope_head_dim=7", "attention.qk_rope_head_dim=7: must be even"),
        ("runtime.dtype=float16", "runtime.dtype=float16: must be one of float32, bfloat16"),
        ("data.length=65", "data.length=65: must not exceed model.max_length=64"),
        ("data.tokenizer=nowhere.json", "nowhere.json"),
        ("mesh.fsdp=3", "does not fit the 8 devices"),
        ("batch.size=12", "batch.size=12: its slices of 12 sequences must be divisible by the 8"),
    ],
)
def test_impossible_fields_are_named(errors, override: str, message: str):
    assert message in errors(None, override)


@pytest.mark.core
def test_rows_that_the_mesh_does_not_divide(errors, corpus, tmp_path):
    config = small_run(tmp_path / "run", corpus, mesh=MeshConfig(fsdp=2, context=4))
    line = errors(config, "data.length=30")
    assert "data.length=30: must be divisible by mesh.context=4" in line
    line = errors(config, "runtime.kernels.mla_attention=reference")
    assert "runtime.kernels.mla_attention='reference': must see a row's keys at once" in line


def test_a_mesh_that_does_not_divide_the_model_names_every_parameter(errors, corpus, tmp_path):
    config = small_run(tmp_path / "run", corpus, mesh=MeshConfig(tensor=8, fsdp=1))
    line = errors(config)
    assert "wq_nope.weight: heads=2 is not divisible by mesh ('tensor',)=8" in line
    assert "lm_head" not in line


def test_an_empty_corpus_names_the_folder(errors, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in errors(small_run(tmp_path / "run", tmp_path / "empty"))
    (tmp_path / "empty" / "none.jsonl").write_text("")
    assert str(tmp_path / "empty") in errors(small_run(tmp_path / "run", tmp_path / "empty"))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_document_longer_than_the_context_names_the_document(errors, corpus, tmp_path: Path):
    (tmp_path / "long").mkdir()
    text = json.dumps({"text": "x" * 40}) + "\n"
    (tmp_path / "long" / "a.jsonl").write_text(text)
    config = small_run(tmp_path / "run", tmp_path / "long")
    line = errors(replace(config, data=replace(config.data, long_documents="error")))
    assert "a.jsonl" in line
    assert "document of 42 tokens is longer than a row, length=32" in line


@pytest.mark.core
def test_a_checkpoint_of_another_config_names_the_fields(errors, trained_run: TrainConfig):
    other = replace(trained_run, model=replace(MODEL, intermediate_dim=64))
    line = errors(replace(other, batch=BatchConfig(size=8)))
    assert line == (
        f"error: directory={trained_run.directory!r}: holds a model of another config: "
        "model.intermediate_dim=48, not 64"
    )
    assert (Path(trained_run.directory) / "checkpoints" / "6").is_dir()


def test_what_is_no_run_is_refused(dsjax, tmp_path: Path):
    code, _, err = dsjax("train", "tiny")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "describes a model; training takes a run" in err
    code, _, err = dsjax("train", tmp_path / "none.py")
    assert (code, err) == (2, f"error: {tmp_path / 'none.py'}: no such config\n")
    code, _, err = dsjax("generate", tmp_path / "none", "--prompt", "a")
    assert (code, len(err.splitlines())) == (2, 1)
    assert str(tmp_path / "none") in err


@pytest.mark.slow
def test_generate_streams_one_prompt_and_labels_several(dsjax, trained_run: TrainConfig):
    run = trained_run.directory
    arguments = ("--max-tokens", 6, "--dtype", "float32")
    code, alone, _ = dsjax("generate", run, "--prompt", "1 + 2", *arguments)
    assert code == 0
    code, both, _ = dsjax("generate", run, "--prompt", "1 + 2", "--prompt", "é", *arguments)
    assert code == 0
    assert both.startswith("--- '1 + 2'\n" + alone + "--- 'é'\n")
    code, out, _ = dsjax("generate", run, "--prompt", "1", "--latent-dtype", "int8", *arguments)
    assert code == 0
    assert out
    code, _, err = dsjax("generate", run, "--prompt", "1", "--chat", *arguments)
    assert code == 2
    assert "has no chat template" in err
    code, _, err = dsjax("generate", run, "--prompt", "1", "--dtype", "float16")
    assert code == 2
    assert "float16" in err


def test_check_prints_the_config(dsjax, trained_run, tmp_path: Path):
    code, out, _ = dsjax("check", write_run(trained_run, tmp_path / "run.py"), "seed=7")
    assert code == 0
    assert "seed=7" in out
    assert "top_groups=2" in out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["generate", "x", "--prompt", "a", "--dtype", "fp32"], "fp32"),
        (["convert", "x", "y", "--dtype", "fp32"], "fp32"),
        (["generate", "x", "--prompt", "a", "--latent-dtype", "int4"], "--latent-dtype"),
        (["generate", "x", "--prompt", "a", "--max-tokens", "2.5"], "--max-tokens"),
        (["generate", "x", "--prompt", "a", "--top-k", "3000000000"], "top_k=3000000000"),
        (["generate", "x", "--prompt", "a", "--seed", "-1"], "seed=-1"),
        (["generate", "x", "--prompt", "a", "--temperature", "nan"], "temperature=nan"),
        (["generate", "x", "--prompt", "a", "--system", "b"], "--system needs --chat"),
        (["generate", "x", "--prompt", "caf\udce9"], "not UTF-8"),
        (["generate", "x"], "--prompt"),
        (["info", "tiny", "--length", "0"], "--length"),
        (["info", "tiny", "--nonsense"], "--nonsense"),
        (["info", "README.md"], "README.md"),
        (["data", "pack", "x", "y", "--length", "0", "--tokenizer", "bytes"], "--length"),
        (
            ["data", "pack", "x", "y", "--length", "8", "--tokenizer", "bytes", "--format", "p"],
            "'p'",
        ),
        (["nonsense"], "nonsense"),
        (["plan", "quickstart", "--topology", "v5e:2x2", "--for", "x"], "'--for': 'x' is not one"),
        (["plan", "quickstart", "--topology", "h100:1", "--slices", "2"], "--slices: is of TPUs"),
        (["plan", "quickstart", "--topology", "h200:2", "--search", "2"], "--search: is of TPUs"),
        (["plan", "quickstart", "--topology", "h100:x"], "topology 'h100:x': must be one of"),
        (["serve", "x", "--api-key-file", "no/keys"], "no/keys: no such file or directory"),
    ],
)
def test_a_wrong_option_is_one_line_before_any_file_is_read(dsjax, arguments, named: str):
    code, out, err = dsjax(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("error: ")
    assert named in err


def test_a_terminal_of_ascii_replaces_what_it_cannot_show(trained_run: TrainConfig):
    for encoding in ("ascii", "latin-1", "cp1252"):
        result = subprocess.run(
            [sys.executable, "-m", "dsjax", "info", "\u8def\u5f84"],
            env=os.environ | {"PYTHONIOENCODING": encoding},
            capture_output=True,
        )
        assert result.returncode == 2
        assert b"error: ??: no such config" in result.stderr


def test_info_takes_what_load_takes(dsjax, trained_run: TrainConfig, monkeypatch):
    def figures(*name: object) -> str:
        code, out, err = dsjax("info", *name, "--json")
        assert code == 0, err
        return out

    run = Path(trained_run.directory)
    step = run / "checkpoints" / "6"
    assert figures(run) == figures(step)
    assert json.loads(figures(run, "num_layers=2"))["parameters"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, _, err = dsjax("info", "deepseek-ai/no-such-model")
    assert (code, err.count("\n")) == (2, 1)
    assert "deepseek-ai/no-such-model: no such config or folder" in err


def test_kernels_are_named_with_v_only(dsjax, trained_run: TrainConfig, caplog):
    for flags, shown in ((), False), (("-v",), True):
        caplog.clear()
        _choose.cache_clear()  # each choice is logged once a process
        dsjax("generate", trained_run.directory, "--prompt", "a", "--max-tokens", 1, *flags)
        assert ("kernels on" in caplog.text) == shown


def test_help_and_version(dsjax):
    assert dsjax("--version") == (0, f"dsjax {dsjax_package.__version__}\n", "")
    for arguments in (["-h"], ["info", "-h"], ["data", "pack", "-h"]):
        code, out, _ = dsjax(*arguments)
        assert code == 0
        assert "Usage" in out


def every_command(group: Any, *names: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        path = (*names, name)
        if hasattr(command, "commands"):
            yield from every_command(command, *path)
        else:
            yield path, command


def test_help_cuts_no_name_and_no_sentence_on_a_narrow_terminal(dsjax, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = dsjax("--help")
    assert "..." not in out.partition("Commands:")[2]
    found = dict(every_command(typer.main.get_command(app)))
    assert {("eval",), ("data", "pack")} <= set(found)
    for path, command in found.items():
        _, out, _ = dsjax(*path, "--help")
        assert "\u2026" not in out
        for option in command.params:
            if option.name != "help" and option.opts[0].startswith("-"):
                assert max(option.opts, key=len) in out, path
            assert option.help or option.name == "help", (path, option.name)


def test_dir_shows_the_api_before_it_is_used():
    program = "import dsjax; print(set(dsjax.__all__) <= set(dir(dsjax)), 'Any' in dir(dsjax))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout == "True False\n"
