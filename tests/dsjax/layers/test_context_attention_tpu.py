"""Attention over divided rows compiled for a TPU: its kernels, and what its program sends."""

from dataclasses import replace
from pathlib import Path

import jax
import pytest

from dsjax.config import BatchConfig, KernelConfig, MeshConfig, RuntimeConfig
from dsjax.configs.models import deepseek_v2_lite
from dsjax.mesh import make_mesh, train_rules
from dsjax.plan.context import row_bytes
from tests.conftest import require_module
from tests.dsjax.context_programs import compile_attention
from tests.dsjax.training.small_runs import small_run

SHARDS, TOKENS = 4, 1024
BF16 = 2


def latent_bytes(transport: str) -> int:
    """What a plan says of one layer."""
    kernels = KernelConfig(latent_exchange=transport)  # type: ignore[arg-type]
    run = small_run(Path("run"), Path("corpus"))
    run = replace(
        run,
        model=replace(deepseek_v2_lite.config, num_layers=1, num_dense_layers=0),
        data=replace(run.data, length=SHARDS * TOKENS),
        batch=BatchConfig(size=1),
        runtime=RuntimeConfig(remat="none", kernels=kernels),
    )
    rules = train_rules(make_mesh(MeshConfig(fsdp=1, context=SHARDS), jax.devices()[:SHARDS]))
    return row_bytes(run, rules)["latent_row_bytes"]


@pytest.mark.slow
@pytest.mark.tpu_program
@pytest.mark.parametrize("transport", ["gather", "ring"])
def test_a_tpus_program_sends_what_a_plan_says(transport):
    """Latents, gradients and document ids, beside the weights that fsdp would gather too."""
    require_module("libtpu")
    (found,) = compile_attention(("v5p:2x2x1", SHARDS, TOKENS, transport))
    sent = {
        name: use["bytes"]
        for name, use in found["collectives"].items()
        if not name.startswith("all-reduce")
    }
    assert {name.partition(" over ")[2] for name in sent} == {"context"}
    attention, width = deepseek_v2_lite.config.attention, deepseek_v2_lite.config.hidden_dim
    heads, rank = attention.num_heads, attention.kv_lora_rank
    nope, rope, value = 128, 64, 128
    expanding = rank * heads * (nope + value)
    others = width * (heads * (nope + rope) + rank + rope + heads * value)
    # Gathered once each; of those that expand latents the gradients are scattered beside them.
    weights = (2 * expanding + others) * BF16 * (SHARDS - 1) // SHARDS
    assert sum(sent.values()) == latent_bytes(transport) + weights
