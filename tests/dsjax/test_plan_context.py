"""Bytes that devices which divide rows send of them: the plan's, counted in compiled programs."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import pytest

from dsjax.config import BatchConfig, KernelConfig, MeshConfig, TrainConfig
from dsjax.configs.models import deepseek_v2_lite
from dsjax.layers.attention.context import Row, Settings, attend_over_row
from dsjax.layers.remat import with_remat
from dsjax.mesh import ShardingRules, make_mesh, train_rules
from dsjax.plan import count_collectives
from dsjax.plan.context import row_bytes
from tests.dsjax.training.small_runs import small_run
from tests.small_models import RUNTIME, SMALL

SUMS = "all-reduce"


def bytes_over_rows(hlo: str | None, mesh: dict[str, int]) -> int:
    """Bytes of gathers, scatters and permutes over the axis that divides rows."""
    uses = count_collectives(hlo or "", mesh)
    return sum(
        use.bytes
        for name, use in uses.items()
        if name.endswith(" over context") and not name.startswith(SUMS)
    )


def attention_run(transport: str, remat: str, mesh: MeshConfig) -> TrainConfig:
    """One layer of the small model over rows of 64 tokens."""
    kernels = KernelConfig(latent_exchange=transport)  # type: ignore[arg-type]
    return small_run(
        Path("run"),
        Path("corpus"),
        model=replace(SMALL, num_layers=1, num_dense_layers=0),
        data=replace(small_run(Path("run"), Path("corpus")).data, length=64),
        batch=BatchConfig(size=4),
        runtime=replace(RUNTIME, remat=remat, kernels=kernels),  # type: ignore[arg-type]
        mesh=mesh,
    )


def attention_bytes(run: TrainConfig, rules: ShardingRules) -> int:
    """What one layer's attention sends forward and backward, as its compiled program says."""
    attention = run.model.attention
    sizes = {
        "batch": run.batch.size,
        "length": run.data.length,
        "heads": attention.num_heads,
        "nope": attention.qk_nope_head_dim,
        "rope": attention.qk_rope_head_dim,
        "value": attention.v_head_dim,
        "latent": attention.kv_lora_rank,
    }
    row = ("batch", "length")
    widths = (
        *((*row, "heads", "nope"), (*row, "heads", "rope"), (*row, "latent"), (*row, "rope")),
        *(("latent", "heads", "nope"), ("latent", "heads", "value")),
    )
    known = dict(rules.table)
    dims = [tuple(dim if dim in known else None for dim in each) for each in widths]
    shapes = [
        jax.ShapeDtypeStruct(
            [sizes[dim] for dim in each], jnp.float32, sharding=rules.sharding(*of)
        )
        for each, of in zip(widths, dims, strict=True)
    ]
    arrays, row_dims = (Row(*leaves) for leaves in cast("Any", (shapes, dims)))
    ids = jax.ShapeDtypeStruct((4, 64), jnp.int32, sharding=rules.sharding(*row))
    settings = Settings("context", run.runtime.kernels.latent_exchange, 0.3, "xla")

    def attend(row: Row, ids: jax.Array) -> jax.Array:
        return attend_over_row(settings, row, ids)

    attend = rules.shard_map(attend, (row_dims, row), dims[0])

    def loss(arrays: Row, ids: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(with_remat(attend, run.runtime.remat)(arrays, ids)))

    assert rules.mesh is not None
    compiled = jax.jit(jax.grad(loss)).lower(arrays, ids).compile()
    return bytes_over_rows(compiled.as_text(), dict(rules.mesh.shape))


@pytest.mark.parametrize("remat", ["none", "full", "save_attention"])
@pytest.mark.parametrize(
    ("transport", "mesh"),
    [
        ("gather", MeshConfig(data=2, fsdp=1, context=4)),
        ("ring", MeshConfig(fsdp=1, context=4, tensor=2)),
        ("gather", MeshConfig(data=2, fsdp=1, context=2, tensor=2)),
    ],
)
def test_a_plan_counts_what_the_compiled_program_sends(transport, mesh, remat):
    run = attention_run(transport, remat, mesh)
    devices = jax.devices()[: mesh.data * mesh.context * mesh.tensor]
    rules = train_rules(make_mesh(mesh, devices))
    assert row_bytes(run, rules)["latent_row_bytes"] == attention_bytes(run, rules)


def test_latents_are_a_small_part_of_per_head_keys():
    """Of V2-Lite in bfloat16: 576 numbers a token where keys and values of 16 heads are 4,160."""
    rules = train_rules(make_mesh(MeshConfig(fsdp=2, context=4)))
    run = attention_run("gather", "full", MeshConfig(fsdp=2, context=4))
    run = replace(
        run,
        model=deepseek_v2_lite.config,
        data=replace(run.data, length=32_768),
        runtime=replace(run.runtime, dtype="bfloat16"),
    )
    sent = row_bytes(run, rules)
    tokens = 27 * 2 * 8192 * 3  # of a chip, to each of three others
    assert sent["latent_row_bytes"] == tokens * (3 * 576 * 2 + 2 * 4)
    assert sent["per_head_row_bytes"] == tokens * (3 * 4160 * 2 + 2 * 4)
    assert row_bytes(run, train_rules(make_mesh(MeshConfig()))) == {}
