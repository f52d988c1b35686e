"""What a model takes of a device: counted as it is when the model and its engine are there."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from flax import nnx
from typer.testing import CliRunner

from dsjax.cli import app
from dsjax.config import EngineConfig
from dsjax.config.load import load_model_config
from dsjax.config.quantisation import RECIPES
from dsjax.engine.fit import fit, fit_table
from dsjax.engine.sizes import expert_capacity, fitting_pages, page_bytes, step_bytes
from dsjax.weights.host_experts import HostExperts, host_experts_of, stored_bytes, take_experts
from tests.small_models import RUNTIME, SMALL, random_model

ENGINE = EngineConfig(max_batch=1, chunk_tokens=64)


@pytest.mark.parametrize("recipe", [None, RECIPES["int4"]], ids=["plain", "int4"])
def test_figures_are_those_of_the_model_that_is_there(recipe, monkeypatch):
    config = replace(SMALL, num_layers=6)
    runtime = replace(RUNTIME, dtype="bfloat16", param_dtype="bfloat16")
    model = random_model(config, runtime=runtime)
    if recipe is not None:
        options = replace(model.options, runtime=replace(runtime, quantisation=recipe))
        model.options = options
        model._quantise(recipe)
    total = bytes_of(model)
    free = fit(config, recipe, None, ENGINE)
    assert (free.weights, free.device_weights, free.host_experts) == (total, total, 0)

    taken = take_experts(model, device_memory=1)
    experts = host_experts_of(taken)
    assert isinstance(experts, HostExperts)
    rest, page = bytes_of(taken), page_bytes(taken, ENGINE)
    # Room for the experts of about a layer, beside the longest context.
    left = 8 * page + 5 * experts.layout.num_bytes
    memory = int((rest + step_bytes(config, ENGINE, 2, experts.layout) + left) / 0.9) + 1
    monkeypatch.setattr("dsjax.weights.host_experts._SHARE_OF_WEIGHTS", (rest + total) / 2 / memory)
    object.__setattr__(experts, "device_memory", memory)
    found = fit(config, recipe, memory, ENGINE)
    pages = fitting_pages(taken, ENGINE, config.max_length // ENGINE.page_size)
    assert found.context_tokens == pages * ENGINE.page_size
    assert found.device_experts == expert_capacity(taken, ENGINE, pages)
    assert 5 <= found.device_experts < sum(map(len, experts.packed))
    assert (found.device_weights, found.host_experts) == (rest, experts.num_bytes)
    assert found.latents_per_token * ENGINE.page_size == page


def bytes_of(model: nnx.Module) -> int:
    """Bytes of a model's arrays, two numbers of 4 bits in one."""
    leaves = jax.tree.leaves(nnx.state(model))
    return sum(stored_bytes(leaf.shape, leaf.dtype) for leaf in leaves)


def test_a_token_reads_what_it_uses():
    config = load_model_config("deepseek_v2_lite")
    found = fit(config, RECIPES["int4"], 16 * 2**30)
    assert found.weights < 9.5e9
    assert found.host_experts == 0
    assert found.context_tokens is not None
    assert found.context_tokens > 32 * 1024
    # 2.66 billion parameters that a token uses, of which the head has 8 bits and int4 4.25.
    assert 2.66e9 * 4.25 / 8 < found.read_per_token < 2.66e9 * 4.7 / 8


def test_info_says_what_the_link_allows():
    arguments = ["info", "deepseek_v2", "--quantize", "int4", "--device-memory", "16GiB", "--json"]
    ended = CliRunner().invoke(app, [*arguments, "--link", "50"])
    assert ended.exit_code == 0, ended.stderr
    figures = json.loads(ended.stdout)
    assert 118e9 < figures["host_expert_bytes"] < 119e9
    assert 4.2e9 < figures["link_bytes_per_token"] < 4.44e9
    assert figures["link_tokens_per_second"] == 50e9 / figures["link_bytes_per_token"]
    assert figures["device_weight_bytes"] < 0.8 * 16 * 2**30
    ended = CliRunner().invoke(app, ["info", "deepseek_v2", "--device-memory", "16GiB"])
    assert "the weights without routed experts take 26,047,784,960 bytes" in str(ended.exception)


def test_the_notebook_shows_what_is_counted():
    notebook = json.loads((Path(__file__).parents[3] / "notebooks" / "chat.ipynb").read_text())
    shown = "".join(notebook["cells"][0]["source"])
    table = fit_table()
    assert "| v5e-1, 16 GB |" in table
    assert table in shown, table
