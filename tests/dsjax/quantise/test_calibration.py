"""Numbers of 4 bits searched for by a text: the search, and a conversion that runs it."""

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.cli import main
from dsjax.config import QuantisationConfig, QuantisationRule
from dsjax.data.tokenizer_files import write_byte_tokenizer
from dsjax.quantise import format_of
from dsjax.quantise.search import inputs_of, search
from dsjax.weights import calibration, calibration_text, load_weights, save_weights
from dsjax.weights.calibration import Calibration
from dsjax.weights.calibration_text import read_text
from dsjax.weights.sources import open_source
from pallas_kernels.quantised import QuantisedWeights, quantise
from tests.dsjax.quantise.test_quantised_models import assert_same
from tests.hf_folders import convert_quietly
from tests.small_models import SMALL, SMALL_MOE, random_model

# 4 bits wherever a matrix takes them, and other forms between.
EVERYWHERE = QuantisationConfig(
    (
        QuantisationRule(r".*\.wk_b", "fp8"),
        QuantisationRule(r".*\.wv_b", "int8"),
        QuantisationRule(r".*\.(wo|w_up)", "int4_g32_zero"),
        QuantisationRule(r".*\.wkv_a", "bfloat16"),
        QuantisationRule(".*", "int4_g64"),
    )
)


def correlated(rng: np.random.Generator, num_rows: int, width: int) -> np.ndarray:
    """Rows whose numbers go together, as a trained model's do, some of them much larger."""
    few = rng.standard_normal((num_rows, width // 4)) @ rng.standard_normal((width // 4, width))
    sizes = np.exp(rng.standard_normal(width))
    return ((few + rng.standard_normal((num_rows, width))) * sizes).astype(np.float32)


def widened(stored: QuantisedWeights) -> np.ndarray:
    return np.asarray(jax.tree.map(jnp.asarray, stored).dequantised(jnp.float32))


@pytest.mark.parametrize("name", ["int4_g32", "int4_g64_zero", "int4_g128"])
def test_products_change_less_than_by_rounding(name, rng):
    form = format_of(name)
    assert form is not None
    rows = correlated(rng, 400, 200)  # whose last group is partial
    weights = rng.standard_normal((48, 200), np.float32)
    moments = rows.T @ rows

    def error(stored) -> float:
        lost = widened(stored) - weights
        return float(np.linalg.norm(rows @ lost.T) / np.linalg.norm(rows @ weights.T))

    plain, found = quantise(weights, form), search(inputs_of(moments))(weights, form)
    found.check("found")
    assert (found.zeros is None) == (plain.zeros is None)
    assert error(found) < 0.55 * error(plain)
    # Columns do not depend on one another, so pieces of a matrix are as the whole.
    part = search(inputs_of(moments))(weights[10:20], form)
    np.testing.assert_array_equal(part.values, found.values[10:20])
    np.testing.assert_array_equal(part.scales, found.scales[10:20])
    # At another scale of the inputs, or of few rows, it is as good a search.
    again = search(inputs_of(moments * 1e-6))(weights, form)
    assert np.mean(again.values != found.values) < 1e-3
    few = search(inputs_of(rows[:3].T @ rows[:3]))(weights, form)
    assert np.isfinite(error(few))


def test_errors_are_taken_off_as_by_elimination_in_float64(rng):
    """GPTQ as its paper first says it: the inverse is reduced by each input that is rounded."""
    form = format_of("int4_g64")
    assert form is not None
    rows, weights = correlated(rng, 300, 150), rng.standard_normal((16, 150), np.float32)
    moments = rows.T.astype(np.float64) @ rows
    found = search(inputs_of(moments.astype(np.float32)))(weights, form)
    scales = np.repeat(found.scales.astype(np.float64), 64, axis=1)[:, :150]
    squares = np.diagonal(moments)
    inverse = np.linalg.inv(moments / squares.mean() + 0.01 * np.eye(150))
    left, numbers = weights.astype(np.float64), np.zeros((16, 150))
    for column in np.argsort(-squares, kind="stable"):
        numbers[:, column] = np.clip(np.round(left[:, column] / scales[:, column]), -8, 7)
        lost = left[:, column] - numbers[:, column] * scales[:, column]
        left -= np.outer(lost / inverse[column, column], inverse[column])
        inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        inverse[column, column] = 1.0  # it is done, and nothing is taken off it any more
    assert np.mean(numbers != found.values.astype(np.float64)) < 0.002


def test_without_inputs_a_search_is_for_the_weights_alone(rng):
    form = format_of("int4_g32")
    assert form is not None
    weights = rng.standard_normal((24, 96), np.float32)
    found, plain = search(inputs_of(np.zeros((96, 96))))(weights, form), quantise(weights, form)

    def error(stored) -> float:
        return float(np.linalg.norm(widened(stored) - weights))

    assert error(found) < 0.95 * error(plain)
    with pytest.raises(ValueError, match="calibrate: what the weights multiply is not finite"):
        inputs_of(np.full((96, 96), np.nan))


MODEL = replace(
    SMALL,
    vocab_size=264,
    num_layers=2,
    moe=replace(SMALL_MOE, num_experts=4, top_k=2, num_groups=2, top_groups=1),
)
NUM_ROWS, LENGTH = 6, 40


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibrated") / "hf"
    save_weights(random_model(MODEL), folder, format="hf")
    write_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "some.txt"
    path.write_text("The quick brown fox jumps over the lazy dog; 0123456789. " * 20)
    return path


@pytest.fixture(scope="module")
def found(hf: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A calibrated conversion, and the stream that it ended with beside it."""
    folder = tmp_path_factory.mktemp("found")
    run = Calibration.run

    def run_and_keep(self, work: Path, progress: bool) -> None:
        run(self, work, progress)
        shutil.copy(work / "calibration.npz", folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration_text, "NUM_ROWS", NUM_ROWS)
        patch.setattr(calibration_text, "ROW_LENGTH", LENGTH)
        # Of six rows four at once, then two.
        patch.setattr(calibration, "_MOST_SCORES", 4 * MODEL.attention.num_heads * LENGTH**2)
        patch.setattr(Calibration, "run", run_and_keep)
        convert_quietly(hf, folder / "ours", quantize=EVERYWHERE, calibrate=text)
        yield folder


def test_the_text_runs_through_the_model_that_is_written(hf, text, found):
    model, plain = load_weights(found / "ours"), load_weights(hf, quantize=EVERYWHERE)
    tokens = jnp.asarray(read_text(text, open_source(hf), EVERYWHERE).tokens_BT)
    assert tokens.shape == (NUM_ROWS, LENGTH)
    with np.load(found / "calibration.npz") as kept:
        assert int(kept["layer"]) == MODEL.num_layers
        hidden = model.norm(jnp.asarray(kept["stream"]))
    np.testing.assert_allclose(model.hidden(tokens)[0], hidden, rtol=2e-3, atol=2e-3)
    # It is another model than the rounded one, and nearer to the one that it was.
    want = np.asarray(load_weights(hf)(tokens))
    lost = [float(np.linalg.norm(np.asarray(other(tokens)) - want)) for other in (model, plain)]
    assert lost[0] < 0.95 * lost[1], lost
    # All of 4 bits is searched but for the embedding, and nothing else.
    rounded = dict(plain.matrices())
    for name, matrix in model.matrices():
        searched = matrix.form is not None and "int4" in matrix.form.dtype and name != "embed"
        same = np.array_equal(matrix.weight[...], rounded[name].weight[...])
        assert same != searched, name


def test_an_interrupted_calibration_goes_on_to_the_same_numbers(
    hf, text, found, tmp_path, monkeypatch
):
    whole, calls = calibration.inputs_of, []

    def fail_late(moments):
        calls.append(moments)
        if len(calls) == 12:
            raise OSError("the disk is full")
        return whole(moments)

    monkeypatch.setattr(calibration, "inputs_of", fail_late)
    with pytest.raises(OSError, match="the disk is full"):
        convert_quietly(hf, tmp_path / "parts", quantize=EVERYWHERE, calibrate=text)
    with np.load(tmp_path / "parts.partial" / "calibration.npz") as kept:
        assert int(kept["layer"]) == 1
    with pytest.raises(ValueError, match="unfinished conversion of something else"):
        convert_quietly(hf, tmp_path / "parts", quantize=EVERYWHERE)
    done = len(calls)
    convert_quietly(hf, tmp_path / "parts", quantize=EVERYWHERE, calibrate=text)
    # One layer, not two: attention's four, the router's, the shared experts' three, two of each
    # expert, and the head's.
    assert len(calls) - done == 4 + 1 + 3 + 2 * 4 + 1
    assert_same(load_weights(tmp_path / "parts"), load_weights(found / "ours"))


def test_wrong_calibrations_are_one_line(hf, text, tmp_path, monkeypatch, capsys):
    bare = tmp_path / "bare"
    save_weights(random_model(SMALL), bare)
    empty = tmp_path / "empty"
    empty.mkdir()
    convert_quietly(hf, tmp_path / "int4", quantize="int4")
    for source, arguments, message in (
        (hf, ["--calibrate", text], "calibrate: searches 4-bit numbers: give quantize too"),
        (hf, ["--quantize", "int8", "--calibrate", text], "the recipe stores nothing in 4 bits"),
        (hf, ["--quantize", "int4", "--calibrate", tmp_path / "no"], "no: no such file or folder"),
        (hf, ["--quantize", "int4", "--calibrate", empty], "no file matches"),
        (bare, ["--quantize", "int4", "--calibrate", text], "bare: holds no tokenizer.json"),
        (tmp_path / "int4", ["--quantize", "int4", "--calibrate", text], "is quantised already"),
        (
            hf,
            ["--quantize", "int4", "--calibrate", text, "--allow-nonfinite"],
            "calibrate: multiplies weights with a text: it takes no allow_nonfinite",
        ),
    ):
        command = ["dsjax", "convert", source, tmp_path / "out", *arguments]
        monkeypatch.setattr("sys.argv", [*map(str, command)])
        with pytest.raises(SystemExit) as exit_:
            main()
        lines = capsys.readouterr().err.splitlines()
        assert exit_.value.code == 2
        assert re.search(re.escape(message), lines[-1]), lines
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.partial").exists()
