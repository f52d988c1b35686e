"""lm-eval over the engine: log-likelihoods and texts against a direct forward pass."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lm_eval.api.instance import Instance
from typer.testing import CliRunner

import dsjax
from dsjax.cli import app
from dsjax.config import EngineConfig
from dsjax.engine import Engine
from dsjax.evaluation.engine_lm import EngineLM
from dsjax.evaluation.tasks import find_tasks, known_tasks, run_tasks
from tests.dsjax.deepseek_checkpoints import VOCAB_SIZE, write_checkpoint
from tests.dsjax.evaluation.iris_tasks import SIZE, write_tasks

LENGTH = 96


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("eval") / "model")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def lm(checkpoint: Path):
    model = dsjax.load(checkpoint, dtype="float32")
    assert model.tokenizer is not None
    config = EngineConfig(
        max_batch=4, batch_sizes=(4,), chunks=((2, 32),), max_length=LENGTH, warm_up=False
    )
    with Engine(model, model.tokenizer, config) as engine:
        lm = EngineLM(engine, name="tiny", shown=False)
        lm.model = model
        yield lm


def instances(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, one, index) for index, one in enumerate(arguments)]


@pytest.fixture(scope="module")
def forward(lm):
    """Log-probabilities [T, W] of the token after each of some ids."""
    known_W = np.arange(VOCAB_SIZE) < lm.model.tokenizer.vocab_size  # other ids are never chosen

    def log_probs(model, tokens_1T):
        return jax.nn.log_softmax(jnp.where(known_W, model(tokens_1T)[0], -jnp.inf))

    compiled = jax.jit(log_probs)

    def run(ids: list[int]) -> np.ndarray:
        padded = np.zeros((1, LENGTH), np.int32)
        padded[0, : len(ids)] = ids
        return np.asarray(compiled(lm.model, jnp.asarray(padded)))[: len(ids)]

    return run


def expected(forward, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    whole = (context + continuation)[-LENGTH:]
    rows_TW = forward(whole)[len(whole) - len(continuation) - 1 : -1]
    chosen = rows_TW[np.arange(len(continuation)), continuation]
    return float(chosen.sum()), bool((rows_TW.argmax(-1) == continuation).all())


def test_loglikelihoods_are_those_of_a_forward_pass(lm, forward):
    tokenizer = lm.model.tokenizer
    best = int(forward(tokenizer.encode_prompt("The iris"))[-1].argmax())
    greedy = tokenizer.decode([best])
    pairs = [
        ("The iris", " setosa"),
        ("The iris ", "versicolor is a flower with blue petals"),
        ("", "An iris"),
        ("花。" * 60, "鸢尾花很美"),  # longer than the context: cut at the left
        ("The iris", greedy),
    ]
    found = lm.loglikelihood(instances("loglikelihood", *pairs))
    for (context, continuation), (total, is_greedy) in zip(pairs, found, strict=True):
        stripped = context.rstrip()
        before = tokenizer.encode_prompt(stripped)
        after = tokenizer.encode_prompt(context + continuation)[len(before) :]
        wanted, best_of_all = expected(forward, before, after)
        assert total == pytest.approx(wanted, abs=1e-4)
        assert is_greedy == best_of_all
    assert len(tokenizer.encode_prompt(pairs[3][0])) > LENGTH
    # The control of `is_greedy`: both answers occur.
    assert [one[1] for one in found[::4]] == [False, True]


def test_rolling_loglikelihoods_score_each_token_once(lm, forward):
    tokenizer = lm.model.tokenizer
    text = "Iris is a genus of flowering plants. " * 30
    ids = tokenizer.encode(text)
    window = LENGTH - 1
    assert len(ids) > 2 * window
    wanted, start = 0.0, 0
    while start < len(ids):
        end = min(start + window, len(ids))
        context = [tokenizer.bos_id] if start == 0 else ids[max(0, end - window - 1) : start]
        wanted += expected(forward, context, ids[start:end])[0]
        start = end
    found = lm.loglikelihood_rolling(instances("loglikelihood_rolling", (text,), ("",)))
    assert found == [pytest.approx(wanted, rel=1e-6), 0]


def test_texts_stop_where_they_are_told_to(lm):
    tokenizer, context = lm.model.tokenizer, "The iris is"
    options = {"until": [], "max_gen_toks": 8}
    (whole,) = lm.generate_until(instances("generate_until", (context, options)))
    ids = tokenizer.encode_prompt(context)
    assert whole == lm.model.generate(ids, max_tokens=8, temperature=0.0)
    stop = whole[len(whole) // 2 :][:3]
    stopped = {"until": [stop], "max_gen_toks": 8}
    assert lm.generate_until(instances("generate_until", (context, stopped))) == [
        whole.split(stop)[0]
    ]
    drawn = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}
    first, second = lm.generate_until(
        instances("generate_until", (context, drawn), (context, drawn))
    )
    assert first != second  # repeats are other samples
    # A context longer than the room is cut at the left.
    long = "花。" * 200
    (cut,) = lm.generate_until(instances("generate_until", (long, options)))
    ids = tokenizer.encode_prompt(long)[-(LENGTH - 8) :]
    assert cut == lm.model.generate(ids, max_tokens=8, temperature=0.0)


@pytest.fixture(scope="module")
def manager(tasks: Path):
    return known_tasks(tasks)


def test_what_cannot_be_scored_is_refused_by_name(lm, manager, tasks: Path):
    def refused(kind: str, *arguments: tuple) -> str:
        with pytest.raises(ValueError, match=r"^(lm-eval|generation_kwargs): ") as error:
            getattr(lm, kind)(instances(kind, *arguments))
        return str(error.value)

    assert "adds no token" in refused("loglikelihood", ("The iris", ""))
    assert "does not fit max_length=96" in refused("loglikelihood", ("a", "花。" * 100))
    assert "num_beams is not known here" in refused("generate_until", ("a", {"num_beams": 4}))
    assert "leaves no room" in refused("generate_until", ("a", {"max_gen_toks": 96}))
    with pytest.raises(
        ValueError, match=r"--tasks iris_choices: there is no such task; did you mean iris_c"
    ):
        find_tasks(manager, ["iris_choices"])
    assert find_tasks(manager, ["iris_c*", str(tasks / "iris_text.yaml")])[0] == "iris_choice"
    with pytest.raises(ValueError, match=r"nowhere: is no folder"):
        known_tasks(tasks / "nowhere")


def test_tasks_run_as_the_evaluator_runs_them(lm, forward, manager, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    names = find_tasks(manager, ["iris_*"])
    assert sorted(names) == ["iris_choice", "iris_text", "iris_words"]
    results = run_tasks(
        lm, manager, names, log_samples=True, bootstrap_iters=0, output=tmp_path / "out"
    )
    tokenizer = lm.model.tokenizer
    for sample in results["samples"]["iris_choice"]:
        for species, (total, _) in zip(
            sample["doc"]["species"], sample["filtered_resps"], strict=True
        ):
            context = tokenizer.encode_prompt(sample["doc"]["question"])
            continuation = tokenizer.encode(f" {species}")
            assert float(total) == pytest.approx(
                expected(forward, context, continuation)[0], abs=1e-4
            )
    assert len(results["samples"]["iris_choice"]) == SIZE
    assert results["results"]["iris_words"]["bits_per_byte,none"] > 1
    (written,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(written.read_text())["results"] == results["results"]
    assert len(list((tmp_path / "out").rglob("samples_*.jsonl"))) == 3


@pytest.mark.slow
def test_the_command_prints_a_table_and_refuses_in_one_line(
    checkpoint, tasks, tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    arguments = [str(checkpoint), "--include-path", str(tasks), "--tasks", "iris_choice"]
    sizes = ["--max-batch=4", "--dtype=float32", "--max-length=96", "--limit=2"]
    result = CliRunner().invoke(app, ["eval", *arguments, *sizes])
    assert result.exit_code == 0, result.output
    assert "|iris_choice|" in result.output
    result = CliRunner().invoke(app, ["eval", *arguments, "--log-samples"])
    assert "--log-samples needs --output" in str(result.exception)
