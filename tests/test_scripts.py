"""Scripts that a person runs: what is wrong with an option is one line."""

import argparse
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


# Of every script that takes arguments; a new one without a row here fails below.
WRONG = [
    ("benchmark_convert.py {made} --model tiny", "{made}/ours: is there already"),
    ("benchmark_engine.py nowhere", "nowhere: no such config"),
    ("benchmark_engine.py tiny --batch 0", "'0' must be a whole number of at least 1"),
    ("benchmark_engine.py tiny --open-loop 0", "--open-loop: a share must be above 0"),
    ("benchmark_engine.py tiny --parts single --open-loop 1", "needs --rate, or the part load"),
    ("benchmark_engine.py tiny --beside-one-card", "--beside-one-card: needs --mesh"),
    ("benchmark_expert_exchange.py all", "'all': must be one of bytes, exchange, layer"),
    ("benchmark_expert_exchange.py layer --transports tcp", "invalid choice: 'tcp'"),
    ("benchmark_grouped_matmul.py fast", "unknown sections ['fast']; there are"),
    ("benchmark_grouped_matmul.py --implementation cuda", "invalid choice: 'cuda'"),
    ("benchmark_host_experts.py tiny --device-memory much", "'much' must be a size such as"),
    ("benchmark_host_experts.py nowhere", "nowhere: no such config"),
    ("benchmark_masks.py nowhere", "tokenizer='nowhere' must be"),
    ("benchmark_masks.py bytes --draws 0", "'0' must be a whole number of at least 1"),
    ("benchmark_mla_attention.py --shapes 16", "'16' must be 2 numbers with x between"),
    ("benchmark_mla_attention.py --shapes 16x-4", "'-4' must be a whole number"),
    ("benchmark_mla_decode.py --cases none", "invalid choice: 'none'"),
    ("benchmark_model.py train tiny no.field=1", "no: no such config field"),
    ("benchmark_model.py train tiny --kernels fast", "invalid choice: 'fast'"),
    ("benchmark_moe_layer.py README.md", "README.md: no config file of ours"),
    ("benchmark_quantised.py products --batch 1.5", "'1.5' must be a whole number"),
    ("benchmark_server.py tiny --rounds 99999999999", "must be a whole number of at least 1"),
    ("benchmark_steps.py nowhere", "nowhere: no such config"),
    ("benchmark_steps.py tiny --rows 16", "'16' must be 2 numbers with x between"),
    ("benchmark_steps.py tiny --prefill 4x4096", "--prefill: 4096 tokens leave no room in 1024"),
    ("benchmark_together.py nowhere", "nowhere: no such folder"),
    ("benchmark_together.py tiny no_field=1", "no_field: no such config field"),
    ("benchmark_training.py no_row", "no_row: no such row"),
    ("kill_run.py nowhere {made}/ours", "nowhere: no such config"),
    ("kill_run.py quickstart {made}/ours --kills 0", "'0' must be a whole number of at least 1"),
    ("plan_maxtext.py v4", "'v4' must be one of v2_lite, v2, v3"),
    ("plan_runs.py nowhere", "'nowhere' must be one of v2_v5p_64"),
    ("plot_run.py {made}/ours", "{made}/ours/run.json"),
    ("plot_run.py . --output run.svg", "--output: 'run.svg' must end in .png"),
    ("tpu_grouped_schedule.py --chips v9", "'v9' must be one of"),
    ("tpu_grouped_schedule.py --shape 1x2", "'1x2' must be 4 numbers with x between"),
    ("tpu_schedule.py decode --heads -1", "'-1' must be a whole number of at least 1"),
    ("tpu_schedule.py attention --chips v5e,", "'' must be one of"),
    ("tune_grouped_matmul.py --kind other", "invalid choice: 'other'"),
    ("tune_mla_attention.py --shapes axb", "'a' must be a whole number of at least 1"),
    ("tune_mla_decode.py --cases none", "invalid choice: 'none'"),
]
QUICKSTART = [
    ("--steps=-1", "--steps: '-1' must be a whole number of at least 1"),
    ("--corpus-bytes=-5", "--corpus-bytes: '-5' must be a whole number of at least 0"),
]
# Options of which any text may be right; what is wrong with it is said by what reads it.
FREE = {"config", "model", "output", "override", "profile", "set"}


def scripts() -> list[str]:
    """Returns the scripts that a person runs, by what runs them."""
    found = (ROOT / "scripts").glob("*.py")
    return sorted(path.name for path in found if "__main__" in path.read_text())


@pytest.mark.parametrize(("argument", "message"), QUICKSTART)
def test_wrong_options_are_one_line(argument, message, tmp_path):
    ended = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "quickstart.py"), argument],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert message in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr
    assert not list(tmp_path.iterdir())


@pytest.fixture
def run_script(monkeypatch, capsys):
    """Runs a script in this process; returns its exit status, what it printed and what it said."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])

    def run(script: str, *arguments: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    return run


def test_no_script_is_left_out():
    assert {line.split()[0] for line, _ in WRONG} | {"quickstart.py"} == set(scripts())


@pytest.mark.parametrize("script", scripts())
def test_every_script_says_what_it_does_and_refuses_an_option_it_has_not(script, run_script):
    code, out, _ = run_script(script, "--help")
    assert code == 0
    assert out.lower().lstrip().startswith("usage: ")
    (about,) = re.findall(r'\A"""(.*)', (ROOT / "scripts" / script).read_text())
    # The first words of the file are those of its help, however wide the terminal.
    assert " ".join(about.split()[:4]) in " ".join(out.split())
    code, _, err = run_script(script, "--no-such-option")
    assert code == 2
    assert "Traceback" not in err


@pytest.mark.parametrize("script", sorted(set(scripts()) - {"benchmark_convert.py"}))
def test_every_option_is_checked_while_arguments_are_read(script, run_script, monkeypatch):
    parsers: list[argparse.ArgumentParser] = []

    def end(parser: argparse.ArgumentParser) -> None:
        parsers.append(parser)
        sys.exit(0)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", end)
    run_script(script)
    (parser,) = parsers
    for action in list(parser._actions):
        if isinstance(action, argparse._SubParsersAction):
            parsers += action.choices.values()
    options = {
        action.option_strings[0]: action
        for each in parsers
        for action in each._actions
        if action.option_strings and action.nargs != 0 and action.dest not in FREE
    }
    for name, action in options.items():
        for wrong in ("?", "-1", "nan", ""):
            with pytest.raises(argparse.ArgumentError, match=name):
                parser._get_values(action, [wrong])


@pytest.mark.parametrize(("line", "message"), WRONG)
def test_wrong_arguments_of_benchmarks_are_one_line(line, message, tmp_path, run_script):
    (tmp_path / "ours").mkdir()
    script, *rest = line.format(made=tmp_path).split()
    code, _, err = run_script(script, *rest)
    assert code == 2
    said = err.splitlines()[-1]
    assert "error: " in said
    assert message.format(made=tmp_path) in said
    assert "Traceback" not in err
    assert (tmp_path / "ours").is_dir()
