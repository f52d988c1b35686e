"""Counts the kernel runs of a training step under each remat policy; run as a module.

In a process of its own: what other tests have traced before changes what jax finds in its caches.
Prints one JSON object, the runs of Hopper's kernels by policy.
"""

import json
from collections import Counter
from dataclasses import replace
from typing import Any, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from dsjax.config import RuntimeConfig
from dsjax.config.runtime import RematPolicy
from dsjax.configs.models import deepseek_v2_lite
from dsjax.kernels import Kernels
from dsjax.model import abstract_model
from dsjax.training.losses import training_loss
from tests.small_models import LOSS

LAYERS = 8  # of which the first has no experts
OPS = ("mla_attention_forward", "mla_attention_backward")  # all other kernels are the experts'
CONFIG = replace(deepseek_v2_lite.config, num_layers=LAYERS)


def kernel_runs(jaxpr: Any, times: int = 1) -> Counter[str]:
    """The runs of each Pallas kernel; a branch or a loop of unknown length counts once."""
    runs: Counter[str] = Counter()
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("pallas_call", "mpmd_map"):
            place = str(equation.source_info.name_stack)
            op = next((op for op in OPS if op in place), "experts")
            runs[op] += times
            continue
        inside = times * equation.params["length"] if equation.primitive.name == "scan" else times
        for part in jax.tree.leaves(list(equation.params.values())):
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                runs += kernel_runs(part, inside)
    return runs


def runs_under(policy: RematPolicy) -> Counter[str]:
    """The kernel runs of a loss and its gradient."""
    kernels = Kernels(mla_attention="hopper", grouped_matmul="hopper", expert_permute="hopper")
    graphdef, params = abstract_model(CONFIG, RuntimeConfig(remat=policy), None, kernels)
    ids = jax.ShapeDtypeStruct((1, 512), jnp.int32)
    batch = dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), ids)
    batch["weights"] = jax.ShapeDtypeStruct((1, 512), jnp.float32)

    def loss(params, batch):
        model = nnx.merge(graphdef, params)
        return training_loss(model, batch, LOSS, jnp.float32(512), 1.0)[0]

    return kernel_runs(jax.make_jaxpr(jax.grad(loss))(params, batch).jaxpr)


if __name__ == "__main__":
    print(json.dumps({policy: runs_under(policy) for policy in get_args(RematPolicy)}))
