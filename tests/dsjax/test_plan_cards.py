"""Plans for NVIDIA cards that are not here."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from dsjax.configs.runs import quickstart
from dsjax.plan import cards
from dsjax.plan.cards import CARDS, card_devices, is_cards, plan_on_cards
from dsjax.plan.figures import largest_arrays
from tests.tpu_compiler import ROOT

HAS_PLUGIN = any(
    importlib.util.find_spec(f"jax_cuda{version}_plugin") is not None for version in (12, 13)
)
needs_plugin = pytest.mark.skipif(not HAS_PLUGIN, reason="needs JAX's plugin for CUDA, no card")


def test_names_of_cards():
    assert is_cards("h100:8")
    assert is_cards("h200")
    assert not is_cards("v5p:4x4x4")
    for wrong in ("h100", "h100:0", "h100:2x2", "h200:"):
        with pytest.raises(ValueError, match=r"^topology '.*': must be one of h100, h200, ':'"):
            card_devices(wrong)


@pytest.mark.skipif(HAS_PLUGIN, reason="JAX's plugin for CUDA is here")
def test_without_the_plugin_one_line_says_what_to_install():
    with pytest.raises(ValueError, match=r"^topology 'h100:1': needs .*dsjax\[cuda\]") as raised:
        card_devices("h100:1")
    assert "\n" not in str(raised.value)


def test_the_largest_arrays_are_named_with_their_kind():
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    small, large = (
        jax.ShapeDtypeStruct((size, 2**20), jnp.float32, sharding=place) for size in (64, 512)
    )
    kinds = {"parameters": {"a": small}, "optimizer": {"mu": {"b": large}}}
    assert largest_arrays(kinds) == "optimizer mu.b 2.00 GiB, parameters a 0.25 GiB"


@needs_plugin
@pytest.mark.slow
def test_a_step_compiles_for_cards_that_are_not_here():
    """The quickstart's step over two H100s: its state, what it sends, and that it fits."""
    command = [sys.executable, "-m", "dsjax", "plan", "quickstart", "mesh.fsdp=2"]
    command += ["runtime.dtype=bfloat16", "--topology", "h100:2", "--json"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    environment.pop("XLA_FLAGS", None)
    ended = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    found = json.loads(ended.stdout)
    assert found["chips"] == 2
    state = found["parameter_bytes"] + found["optimizer_bytes"]
    assert state < found["peak_bytes"] < found["capacity_bytes"] < CARDS["h100"].memory
    assert found["collectives"]["all-gather over fsdp"]["expected_bytes"] > 0
    assert found["collective_bytes"] > found["parameter_bytes"] / 2


@needs_plugin
@pytest.mark.slow
def test_a_step_that_does_not_fit_names_the_largest_arrays(monkeypatch):
    monkeypatch.setattr(cards, "_OF_CARD", 1e-3)
    run = quickstart.config
    with pytest.raises(
        ValueError, match=r"does not fit a card of h100:1: it needs .*: parameters moe_layers"
    ):
        plan_on_cards(replace(run, mesh=replace(run.mesh, fsdp=1)), "h100:1")
