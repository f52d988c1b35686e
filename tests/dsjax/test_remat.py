"""What each remat policy runs again, counted over the loops of a training step."""

from collections import Counter
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from dsjax.config import RuntimeConfig
from dsjax.config.runtime import RematPolicy
from dsjax.configs.models import deepseek_v2_lite
from dsjax.kernels import Kernels
from dsjax.model import abstract_model
from dsjax.training.losses import training_loss
from tests.small_models import LOSS

LAYERS = 8
CONFIG = replace(deepseek_v2_lite.config, num_layers=LAYERS)  # of which the first has no experts
ATTENTION, SWIGLU, PRODUCT = "mla_attention_forward", "grouped_swiglu", "grouped_matmul"


def kernel_runs(jaxpr: Any, times: int = 1) -> Counter[str]:
    """The runs of each Pallas kernel; a branch or a loop of unknown length counts once."""
    runs: Counter[str] = Counter()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            runs[equation.params["name"]] += times
            continue
        inside = times * equation.params["length"] if equation.primitive.name == "scan" else times
        for part in jax.tree.leaves(list(equation.params.values())):
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                runs += kernel_runs(part, inside)
    return runs


# Gate and up are one kernel, down another; each of the two has one more product for its gradient.
@pytest.mark.parametrize(
    ("policy", "attention", "swiglu", "products"),
    [
        ("none", 1, 1, 3),
        ("full", 2, 2, 4),
        ("save_attention", 1, 2, 4),
        ("save_dots", 1, 1, 3),
    ],
)
def test_kernels_run_as_often_as_the_policy_says(
    policy: RematPolicy, attention: int, swiglu: int, products: int
):
    kernels = Kernels(mla_attention="tpu", grouped_matmul="tpu")
    graphdef, params = abstract_model(CONFIG, RuntimeConfig(remat=policy), None, kernels)
    ids = jax.ShapeDtypeStruct((1, 512), jnp.int32)
    batch = dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), ids)
    batch["weights"] = jax.ShapeDtypeStruct((1, 512), jnp.float32)

    def loss(params, batch):
        model = nnx.merge(graphdef, params)
        return training_loss(model, batch, LOSS, jnp.float32(512), 1.0)[0]

    runs = kernel_runs(jax.make_jaxpr(jax.grad(loss))(params, batch).jaxpr)
    assert runs[ATTENTION] == attention * LAYERS
    assert runs["mla_attention_backward"] == LAYERS
    assert runs[SWIGLU] == swiglu * (LAYERS - 1)
    assert runs[PRODUCT] == products * (LAYERS - 1)
