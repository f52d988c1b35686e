"""What a model takes of a device and of its host, and what a token reads: counted, not run."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx

from dsjax.config import RECIPES, EngineConfig, ModelConfig, QuantisationConfig, RuntimeConfig
from dsjax.config.load import load_model_config
from dsjax.config.runtime import LatentDType
from dsjax.engine.sizes import step_bytes
from dsjax.kernels import pool_rope_dim
from dsjax.layers.moe import MoE
from dsjax.layers.moe.packed import ExpertLayout
from dsjax.mesh import ShardingRules
from dsjax.model import abstract_model
from dsjax.weights.host_experts import is_routed, must_leave_device, stored_bytes

# Colab's, in GB; the kernel that reads the cache says how it is padded.
_CARDS = {
    "T4": (16, "xla"),
    "L4": (24, "xla"),
    "A100": (40, "xla"),
    "v5e-1": (16, "tpu"),
    "v6e-1": (32, "tpu"),
}
_OF_CARD = 0.95  # what a process is given: XLA_PYTHON_CLIENT_MEM_FRACTION
# One sequence at a time, as on a small machine.
_ALONE = EngineConfig(max_batch=1)


@dataclass(frozen=True)
class Fit:
    """How a model lies on a device and its host, in bytes, for one sequence at a time.

    Attributes:
        weights: all of them, as they are stored.
        device_weights: those on the device for good.
        host_experts: routed experts in the host's memory.
        read_per_token: of weights, that decoding one token reads on the device: all but the
            embedding's other rows and the experts that are not chosen.
        latents_per_token: of the cache.
        device_experts: experts that the device keeps of those in the host's memory, beside the
            longest context.
        context_tokens: that the device has room for, no more than the model takes; None without
            a limit.
        link_per_token: that cross the host's link for a token, where routing is uniform and no
            expert is more wanted than another.
    """

    weights: int
    device_weights: int
    host_experts: int
    read_per_token: int
    latents_per_token: int
    device_experts: int
    context_tokens: int | None
    link_per_token: int


def fit(
    config: ModelConfig,
    recipe: QuantisationConfig | None,
    device_memory: int | None,
    engine: EngineConfig = _ALONE,
    decode_kernel: str = "xla",
    latent_dtype: LatentDType | None = None,
) -> Fit:
    """Counts what `load(..., quantize=recipe, device_memory=...)` and an engine come to.

    Args:
        config: the model.
        recipe: which weights are stored in fewer bits; the others are bfloat16.
        device_memory: bytes of the device that the model may take; None for as many as it needs.
        engine: sizes of the engine.
        decode_kernel: implementation of `mla_decode` that reads the cache.
        latent_dtype: of the cached latents, as `RuntimeConfig` has it.

    Raises:
        ValueError: the weights do not fit, not even without routed experts; or the recipe does not
            fit the model.
    """
    runtime = RuntimeConfig(param_dtype="bfloat16", quantisation=recipe, latent_dtype=latent_dtype)
    graphdef, abstract = abstract_model(config, runtime)
    flat = {tuple(map(str, path)): leaf for path, leaf in nnx.to_flat_state(abstract)}
    sizes = {path: stored_bytes(leaf.shape, leaf.dtype) for path, leaf in flat.items()}
    total, embed = sum(sizes.values()), sizes["embed", "weight"]
    routed = sum(size for path, size in sizes.items() if is_routed(path))
    moe = config.moe
    share = 0.0 if moe is None else moe.top_k / moe.num_experts
    read = total - routed - embed + embed // config.vocab_size + int(share * routed)
    itemsize, attention = jnp.dtype(runtime.dtype).itemsize, config.attention
    rope = pool_rope_dim(attention.qk_rope_head_dim, decode_kernel)
    latent = attention.kv_lora_rank * jnp.dtype(runtime.cached_dtype).itemsize
    scale = 0 if latent_dtype is None else 4
    latents = config.num_layers * (latent + scale + rope * itemsize)
    if device_memory is None:
        return Fit(total, total, 0, read, latents, 0, None, 0)
    leaves = must_leave_device(
        abstract, lambda path: jnp.dtype(flat[path].dtype), device_memory, ShardingRules()
    )
    layout = None
    if leaves:
        layers = nnx.merge(graphdef, abstract).moe_layers
        assert layers is not None
        assert isinstance(layers.feed_forward, MoE)
        layout = ExpertLayout.of(layers.feed_forward)
    weights = total - routed if leaves else total
    left = int(device_memory * engine.memory_fraction) - weights
    left -= step_bytes(config, engine, itemsize, layout)
    page = latents * engine.page_size
    # As `sizes.fitting_pages`: where experts are in the host's memory, half is theirs.
    room = left // 2 if leaves else left
    tokens = max(0, min(room // page * engine.page_size, engine.max_length or config.max_length))
    if layout is None or moe is None:
        return Fit(total, weights, 0, read, latents, 0, tokens, 0)
    all_experts = config.num_moe_layers * moe.num_experts
    kept = max(0, min(all_experts, (left - tokens * latents) // layout.num_bytes))
    missed = config.num_moe_layers * moe.top_k * (1 - kept / all_experts)
    on_host = all_experts * layout.num_bytes
    crossing = int(missed * layout.num_bytes)
    return Fit(total, weights, on_host, read, latents, kept, tokens, crossing)


def fit_table() -> str:
    """Returns what fits where as a table in Markdown: tokens of context, by card and format."""
    columns: list[tuple[str, str, str | None]] = [
        ("V2-Lite int4", "deepseek_v2_lite", "int4"),
        ("V2-Lite int8", "deepseek_v2_lite", "int8"),
        ("V2-Lite bf16", "deepseek_v2_lite", None),
        ("V2 (236B) int4", "deepseek_v2", "int4"),
    ]
    rows = [["", *(title for title, _, _ in columns)], ["---"] * (len(columns) + 1)]
    for card, (size, kernel) in _CARDS.items():
        memory = int(_OF_CARD * size * 1e9)
        cells = [f"{card}, {size} GB"]
        for _, name, recipe in columns:
            model, stored = load_model_config(name), None if recipe is None else RECIPES[recipe]
            try:
                found = fit(model, stored, memory, decode_kernel=kernel)
            except ValueError:
                cells.append("no")
                continue
            on_host = f"; {found.host_experts / 1e9:.0f} GB on the host"
            tokens = f"{found.context_tokens or 0:,}"
            cells.append(
                tokens + (on_host if found.host_experts else "") if tokens != "0" else "no"
            )
        rows.append(cells)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"
