"""The quickstart's parts that need no training: whose folder it clears, what it draws."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import quickstart

from dsjax.training.picture import smoothed


def test_a_folder_that_it_did_not_make_is_left_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--output", str(tmp_path)])
    monkeypatch.setattr(quickstart, "prepare_data", lambda _: pytest.fail("it went on"))
    with pytest.raises(SystemExit):
        quickstart.main()
    assert "was not made by the quickstart" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_its_own_folder_loses_only_what_it_made(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").touch()
    output = tmp_path / "new" / "folder"
    quickstart.start_afresh(output)
    (output / "run").mkdir()
    (output / "hf").symlink_to(elsewhere)
    (output / "notes.txt").touch()
    quickstart.start_afresh(output)
    assert sorted(path.name for path in output.iterdir()) == [quickstart.MARKER, "notes.txt"]
    assert (elsewhere / "kept").exists()
    with pytest.raises(ValueError, match="is a file"):
        quickstart.start_afresh(output / "notes.txt")


def test_the_smoothed_course_lags_on_no_side():
    assert smoothed([3.0] * 7) == pytest.approx([3.0] * 7)
    falling = [100.0 - step for step in range(100)]
    assert smoothed(falling) == pytest.approx(falling)
    assert smoothed([2.5]) == [2.5]
    assert smoothed([1.0, 2.0]) == pytest.approx([1, 2])
    # A loss that falls fast and then slowly begins where its first values are.
    steep = [4.5 + 3.7 * 0.85**step for step in range(18)]
    assert smoothed(steep, 2)[0] == pytest.approx(steep[0], abs=0.2)
    assert smoothed(steep, 2)[-1] == pytest.approx(steep[-1], abs=0.1)


def test_every_evaluation_of_the_quickstart_is_of_the_same_rows_as_xz():
    from dsjax.config.load import load_train_config

    assert load_train_config(quickstart.RUN).log.eval_rows == 0


def test_the_notebooks_first_cell_runs_twice_and_asks_for_an_address_without_a_checkout(
    tmp_path, monkeypatch
):
    root = Path(__file__).parent.parent
    notebook = json.loads((root / "notebooks" / "quickstart.ipynb").read_text())
    cell = "".join(notebook["cells"][1]["source"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DSJAX_CHECKOUT", raising=False)
    with pytest.raises(ValueError, match="set REPOSITORY"):
        exec(cell, {})
    monkeypatch.chdir(root / "notebooks")
    names: dict[str, object] = {}
    for _ in range(2):
        exec(cell, names)
        assert Path.cwd() == root
