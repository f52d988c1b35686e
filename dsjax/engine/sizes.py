"""How many pages an engine's pool has: what the device's memory leaves, said in one line."""

from __future__ import annotations

import logging
import math

import jax
import jax.numpy as jnp
from flax import nnx

from dsjax.cache import LatentPool, allocate_pool
from dsjax.config import EngineConfig, ModelConfig
from dsjax.layers.moe.packed import ExpertLayout
from dsjax.mesh import ShardingRules, inference_rules, serving_rules
from dsjax.model import DeepSeekV2
from dsjax.weights.host_experts import host_experts_of, stored_bytes

_LOG = logging.getLogger(__name__)

# Where a device does not say what memory it has (CPU): room for so many whole sequences.
_SEQUENCES_WITHOUT_LIMIT = 4


def num_pages(
    model: DeepSeekV2, config: EngineConfig, memory: tuple[int, int] | None = None
) -> int:
    """Returns the number of pages of the pool, of one device.

    Args:
        model: the model.
        config: sizes.
        memory: bytes that a device may hold, and those in use; None asks the model's.

    Raises:
        ValueError: the weights leave no room for one sequence of `max_length`; says what to lower.
    """
    if config.num_pages is not None:
        return config.num_pages
    per_sequence = -(-max_length(model, config) // page_tokens(model, config))
    sequences = -(-config.max_batch // num_lanes(model))
    memory = memory or _memory(model)
    if memory is None:
        sequences = min(sequences, _SEQUENCES_WITHOUT_LIMIT)
    pages = fitting_pages(model, config, sequences * per_sequence, memory)
    _LOG.info("engine: %d tokens of latents", pages * page_tokens(model, config))
    return pages


def fitting_pages(
    model: DeepSeekV2, config: EngineConfig, wanted: int, memory: tuple[int, int] | None = None
) -> int:
    """Returns the number of pages wanted, or as many as the device has memory for.

    Args:
        model: the model.
        config: sizes.
        wanted: pages.
        memory: as for `num_pages`.

    Raises:
        ValueError: they do not hold one sequence of `max_length`; says what to lower.
    """
    memory = memory or _memory(model)
    if memory is None:
        return wanted
    limit, used = memory
    page, computing = page_bytes(model, config), computing_bytes(model, config)
    left = int(limit * config.memory_fraction) - used - computing
    length = max_length(model, config)
    per_sequence = -(-length // page_tokens(model, config))
    if host_experts_of(model) is not None:  # what latents leave keeps experts
        wanted = min(wanted, max(per_sequence, left // 2 // page))
    pages = min(wanted, left // page)
    if pages < min(wanted, per_sequence):
        raise ValueError(
            f"engine: of {limit / 1e9:.1f} GB, {used / 1e9:.1f} are used and "
            f"{computing / 1e9:.1f} kept for computing; what is left does not hold one sequence of "
            f"max_length={length} ({per_sequence * page / 1e9:.1f} GB): lower max_length, "
            f"max_batch={config.max_batch} or chunk_tokens={config.chunk_tokens}, or raise "
            f"memory_fraction={config.memory_fraction}"
        )
    _LOG.info(
        "engine: of %.1f GB %.1f are in use, %.1f kept for computing, %.1f hold latents",
        limit / 1e9,
        used / 1e9,
        computing / 1e9,
        pages * page / 1e9,
    )
    return pages


def expert_capacity(model: DeepSeekV2, config: EngineConfig, num_pages: int) -> int:
    """Returns how many experts the device can keep of those in the host's memory.

    Raises:
        ValueError: there is none in the host's memory.
    """
    experts = host_experts_of(model)
    if experts is None:
        raise ValueError("model: it has no experts in the host's memory")
    total = sum(map(len, experts.packed))
    memory = _memory(model)
    if memory is None:
        return total
    limit, used = memory
    latents = num_pages * page_bytes(model, config)
    left = int(limit * config.memory_fraction) - used - latents - computing_bytes(model, config)
    capacity = min(total, max(0, left // experts.layout.num_bytes))
    _LOG.info("engine: the device keeps %d of %d experts", capacity, total)
    return capacity


def wave_sizes(config: ModelConfig) -> list[int]:
    """Returns how many experts from the host's memory one product may have, rising.

    A token's experts, and twice and four times as many.
    """
    assert config.moe is not None
    sizes = {min(config.moe.top_k * times, config.moe.num_experts) for times in (1, 2, 4)}
    return sorted(sizes)


def _memory(model: DeepSeekV2) -> tuple[int, int] | None:
    """Returns the bytes that a device may hold, and those in use; None where nothing says (CPU)."""
    leaves = jax.tree.leaves(nnx.state(model))
    device = min(leaves[0].devices(), key=lambda d: d.id)
    stats = device.memory_stats() or {}
    experts = host_experts_of(model)
    limits = (stats.get("bytes_limit"), None if experts is None else experts.device_memory)
    known = [limit for limit in limits if limit is not None]
    if not known:
        return None
    of_model = sum(stored_bytes(leaf.shape, leaf.dtype) for leaf in leaves)
    return min(known), stats.get("bytes_in_use", of_model)


def serving_model_rules(model: DeepSeekV2) -> ShardingRules:
    """Returns the rules that an engine runs a model by: devices divide sequences and pages.

    A model that is laid out in another way than for generation keeps its own.
    """
    rules = model.options.rules
    return serving_rules(rules.mesh) if rules == inference_rules(rules.mesh) else rules


def num_lanes(model: DeepSeekV2) -> int:
    """Returns the devices that have sequences and pages of their own."""
    return serving_model_rules(model).num_shards("pages")


def page_tokens(model: DeepSeekV2, config: EngineConfig) -> int:
    """Returns the tokens of a page on all devices that divide it, which are those of heads."""
    return config.page_size * serving_model_rules(model).num_shards("page_tokens")


def max_length(model: DeepSeekV2, config: EngineConfig) -> int:
    """Returns the tokens that a sequence may have.

    Raises:
        ValueError: `max_length` is more than the model's.
    """
    length = config.max_length or model.config.max_length
    if length > model.config.max_length:
        raise ValueError(
            f"engine.max_length={length}: must be at most model.max_length="
            f"{model.config.max_length}"
        )
    return length


def pool_shapes(model: DeepSeekV2, config: EngineConfig, num_pages: int) -> LatentPool:
    """Returns the shapes and types of a pool, allocating nothing.

    Args:
        model: the model.
        config: sizes.
        num_pages: pages of each layer, of one device.
    """
    options = model.options
    shapes: LatentPool = jax.eval_shape(
        lambda: allocate_pool(
            model.config,
            num_pages,
            options.latent_dtype,
            page_size=page_tokens(model, config),
            rope_dtype=options.dtype,
            decode_kernel=options.kernels.mla_decode,
            num_shards=num_lanes(model),
        )
    )
    return shapes


def page_bytes(model: DeepSeekV2, config: EngineConfig) -> int:
    """Returns the bytes of one page in all layers, on one device."""
    leaves = jax.tree.leaves(pool_shapes(model, config, 1))
    total = sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in leaves)
    return total // (num_lanes(model) * page_tokens(model, config) // config.page_size)


def computing_bytes(model: DeepSeekV2, config: EngineConfig) -> int:
    """Estimates the memory that a step takes beside weights and pool."""
    experts = host_experts_of(model)
    layout = None if experts is None else experts.layout
    return step_bytes(model.config, config, jnp.dtype(model.options.dtype).itemsize, layout)


def step_bytes(
    sizes: ModelConfig, config: EngineConfig, itemsize: int, layout: ExpertLayout | None
) -> int:
    """Does the same of a model that is not there.

    Args:
        sizes: the model's.
        config: the engine's.
        itemsize: bytes of a number of the compute type.
        layout: of experts that are in the host's memory, if they are.
    """
    rows = max(b * t for b, t in config.chunk_shapes()) + config.max_batch
    attention, moe = sizes.attention, sizes.moe
    heads = attention.num_heads
    widths = attention.qk_nope_head_dim + attention.qk_rope_head_dim + attention.v_head_dim
    # Of one layer: queries, keys, values and outputs, twice in float32 while blocks are merged.
    row = heads * (widths * itemsize + 3 * 4 * attention.v_head_dim)
    row += heads * (attention.kv_lora_rank + attention.qk_rope_head_dim) * itemsize
    if moe is not None:
        row += moe.top_k * (2 * moe.intermediate_dim + 2 * sizes.hidden_dim) * itemsize
    # Logits in float32, their copies while one is chosen, and the counts of tokens.
    choice = config.max_batch * sizes.vocab_size * 4 * 6
    found = 2 * rows * row + choice + 2**28
    if layout is None:
        return found
    # Experts on their way from the host: copied, side by side, and widened.
    weights = sum(math.prod(leaf.shape) for leaf in layout.leaves if leaf.leaf == "weight")
    return found + wave_sizes(sizes)[-1] * (4 * layout.num_bytes + weights * itemsize)
