"""Scripts that a person runs: what is wrong with an option is one line."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quickstart.py", "--steps=-1"], "--steps: must be at least 1"),
        (["quickstart.py", "--corpus-bytes=-5"], "--corpus-bytes: must be at least 0"),
    ],
)
def test_wrong_options_are_one_line(arguments, message, tmp_path):
    script, *rest = arguments
    ended = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / script), *rest],
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


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("benchmark_convert.py {made} --model tiny", "{made}/ours: is there already"),
        ("benchmark_engine.py nowhere", "nowhere: no such config"),
        ("benchmark_engine.py tiny --batch 0", "'0' must be a whole number of at least 1"),
        ("benchmark_expert_exchange.py all", "'all': must be one of bytes, exchange, layer"),
        ("benchmark_expert_exchange.py layer --transports tcp", "invalid choice: 'tcp'"),
        ("benchmark_grouped_matmul.py fast", "unknown sections ['fast']; there are"),
        ("benchmark_grouped_matmul.py --implementation cuda", "invalid choice: 'cuda'"),
        ("benchmark_mla_attention.py --shapes 16", "'16' must be 2 numbers with x between"),
        ("benchmark_mla_attention.py --shapes 16x-4", "'-4' must be a whole number"),
        ("benchmark_mla_decode.py --cases none", "invalid choice: 'none'"),
        ("benchmark_model.py train tiny no.field=1", "no: no such config field"),
        ("benchmark_model.py train tiny --kernels fast", "invalid choice: 'fast'"),
        ("benchmark_moe_layer.py README.md", "README.md: no config file of ours"),
        ("benchmark_quantised.py products --batch 1.5", "'1.5' must be a whole number"),
        ("benchmark_server.py tiny --rounds 99999999999", "must be a whole number of at least 1"),
        ("benchmark_training.py no_row", "no_row: no such row"),
        ("plot_run.py {made}/ours", "{made}/ours/run.json"),
        ("plot_run.py . --output run.svg", "--output: 'run.svg' must end in .png"),
        ("tpu_grouped_schedule.py --chips v9", "'v9' must be one of"),
        ("tpu_grouped_schedule.py --shape 1x2", "'1x2' must be 4 numbers with x between"),
        ("tpu_schedule.py decode --heads -1", "'-1' must be a whole number of at least 1"),
        ("tpu_schedule.py attention --chips v5e,", "'' must be one of"),
        ("tune_grouped_matmul.py --kind other", "invalid choice: 'other'"),
        ("tune_mla_attention.py --shapes axb", "'a' must be a whole number of at least 1"),
        ("tune_mla_decode.py --cases none", "invalid choice: 'none'"),
    ],
)
def test_wrong_arguments_of_benchmarks_are_one_line(line, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "ours").mkdir()
    script, *rest = line.format(made=tmp_path).split()
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])
    monkeypatch.setattr(sys, "argv", [script, *rest])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
    assert ended.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "error: " in said
    assert message.format(made=tmp_path) in said
    assert (tmp_path / "ours").is_dir()
