"""lm-eval's own client of a server gives the numbers that `dsjax eval` gives in the process."""

import json
import shutil
from pathlib import Path

import pytest

import dsjax
from dsjax.config import EngineConfig
from dsjax.engine import Engine
from dsjax.evaluation.engine_lm import EngineLM
from dsjax.evaluation.tasks import find_tasks, known_tasks, run_tasks
from tests.dsjax.deepseek_checkpoints import write_checkpoint
from tests.dsjax.evaluation.iris_tasks import SIZE, write_tasks
from tests.dsjax.serving.served import serving

transformers = pytest.importorskip("transformers")  # which lm-eval's client counts tokens with

LENGTH = 160
TASKS = ("iris_choice", "iris_text", "iris_words")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("eval") / "model")


@pytest.fixture(scope="module")
def engine(checkpoint: Path):
    model = dsjax.load(checkpoint, dtype="float32")
    assert model.tokenizer is not None
    config = EngineConfig(
        max_batch=4, batch_sizes=(4,), chunks=((2, 64),), max_length=LENGTH, warm_up=False
    )
    with Engine(model, model.tokenizer, config) as made:
        made.start()
        yield made


@pytest.fixture(scope="module")
def found(engine, checkpoint, tmp_path_factory):
    """The results of both, with BOS and without, with one request at a time and with several."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    folder = tmp_path_factory.mktemp("tasks")
    manager = known_tasks(write_tasks(folder))
    names = find_tasks(manager, TASKS)
    with_bos = folder / "with_bos"
    shutil.copytree(checkpoint, with_bos)
    put_bos_first(with_bos / "tokenizer.json")
    with pytest.MonkeyPatch.context() as patch, serving(engine) as served:
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        models = {
            "process": EngineLM(engine, name="tiny", shown=False),
            "process without BOS": EngineLM(engine, name="tiny", shown=False, add_bos=False),
        }
        for kind, tokenizer, options in (
            ("one", with_bos, {}),
            ("at once", with_bos, {"num_concurrent": 4}),
            ("batches without BOS", checkpoint, {"batch_size": 3}),
        ):
            models[kind] = LocalCompletionsAPI(
                base_url=f"{served.url}/v1/completions",
                model="small",
                tokenizer=str(tokenizer),
                tokenizer_backend="huggingface",
                add_bos_token=True,
                max_length=LENGTH,
                **options,
            )
        yield {
            kind: run_tasks(model, manager, names, log_samples=True, bootstrap_iters=0)
            for kind, model in models.items()
        }
        served.wait_until_idle()


def put_bos_first(file: Path) -> None:
    """Writes into a tokenizer what our own say: transformers 5 puts no BOS first for V2's."""
    bos = "<｜begin▁of▁sentence｜>"
    description = json.loads(file.read_text("utf-8"))
    token = {"SpecialToken": {"id": bos, "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    template = {
        "type": "TemplateProcessing",
        "single": [token, text],
        "pair": [token, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos: {"id": bos, "ids": [100_000], "tokens": [bos]}},
    }
    both = {"type": "Sequence", "processors": [description["post_processor"], template]}
    file.write_text(json.dumps(description | {"post_processor": both}), "utf-8")


def answers(results, task):
    return [sample["filtered_resps"] for sample in results["samples"][task]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "inside"),
    [
        ("one", "process"),
        ("at once", "process"),
        ("batches without BOS", "process without BOS"),
    ],
)
def test_the_server_s_numbers_are_the_process_s(found, kind, inside):
    inside, outside = found[inside], found[kind]
    pairs = list(zip(answers(inside, "iris_choice"), answers(outside, "iris_choice"), strict=True))
    assert len(pairs) == SIZE
    for ours, theirs in pairs:
        assert len(ours) == 3
        for (score, is_greedy), (served_score, served_greedy) in zip(ours, theirs, strict=True):
            assert float(served_score) == pytest.approx(float(score), abs=1e-4)
            assert served_greedy == is_greedy
    # The control: scores of one question differ by far more than they agree.
    spread = [abs(float(ours[0][0]) - float(ours[1][0])) for ours, _ in pairs]
    assert min(spread) > 1e-2
    assert answers(outside, "iris_text") == answers(inside, "iris_text")
    assert any(text for (text,) in answers(inside, "iris_text"))
    # Of a whole text the client puts BOS first twice, where it puts it first at all.
    tasks = TASKS if "without BOS" in kind else TASKS[:2]
    for task in tasks:
        for name, value in inside["results"][task].items():
            if isinstance(value, float):
                assert outside["results"][task][name] == pytest.approx(value, rel=1e-6), name
