"""What devices that divide rows send of them, and what they would send with per-head keys."""

from __future__ import annotations

import jax.numpy as jnp

from dsjax.config import TrainConfig
from dsjax.mesh import ShardingRules


def row_bytes(run: TrainConfig, rules: ShardingRules) -> dict[str, int]:
    """Returns the bytes that a chip sends in a step over the mesh axis `context` for attention.

    They are those of the program's gathers, scatters and permutes over that axis; its sums are of
    gradients and losses. `dsjax.layers.attention.context` says how often a part of a row travels.
    Around a ring of two, XLA may send a part once that is sent twice here.

    Args:
        run: the run.
        rules: where its arrays live.

    Returns:
        Of `latent_row_bytes`, latents, rotary keys and document ids as they are sent, and of
        `per_head_row_bytes`, each head's keys and values in the latents' place. Empty where the
        mesh divides no row.
    """
    shards = rules.num_shards("length")
    if shards == 1:
        return {}
    attention, hops = run.model.attention, shards - 1
    # All policies compute the gathered latents again; only those that keep attention's output spare
    # a ring its second way forward.
    remat = run.runtime.remat
    if run.runtime.kernels.latent_exchange == "gather":
        times = (hops if remat == "none" else 2 * hops) + hops
    else:
        times = (2 * hops if remat == "full" else hops) + hops + shards
    rows = run.batch.size // run.batch.accumulate // rules.num_batch_shards()
    tokens = rows * (run.data.length // shards) * run.batch.accumulate * run.model.num_layers
    ids = tokens * hops * 4 * (1 if remat == "none" else 2)
    size = jnp.dtype(run.runtime.dtype).itemsize
    heads = attention.num_heads // rules.num_shards("heads")
    of_heads = heads * (attention.qk_nope_head_dim + attention.v_head_dim)
    return {
        name: tokens * times * (width + attention.qk_rope_head_dim) * size + ids
        for name, width in (
            ("latent_row_bytes", attention.kv_lora_rank),
            ("per_head_row_bytes", of_heads),
        )
    }
