"""Tokens of a page divided over the devices that divide heads: what each has, reads and sends."""

from dataclasses import replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsjax.cache import LatentPool, Part, View, allocate_pool, pool_dims
from dsjax.config import AttentionConfig, MeshConfig, RuntimeConfig
from dsjax.config.runtime import LatentDType
from dsjax.configs.models import deepseek_v2, deepseek_v2_lite
from dsjax.kernels import Kernels
from dsjax.layers.attention import MLA
from dsjax.layers.options import LayerOptions
from dsjax.mesh import ShardingRules, inference_rules, make_mesh, serving_rules, train_rules
from dsjax.model import param_shardings
from dsjax.plan import count_collectives
from tests.small_models import SMALL

CONFIG = replace(SMALL, num_layers=1, init_std=0.3, attention=replace(SMALL.attention, num_heads=4))
PAGE, COLUMNS, BATCH = 8, 4, 5
DType = Literal["float32", "bfloat16"]


def rules_of(**axes: int) -> ShardingRules:
    mesh = MeshConfig(**({"fsdp": 1} | axes))
    return serving_rules(make_mesh(mesh, jax.devices()[: int(np.prod(list(axes.values())))]))


def an_mla(rules: ShardingRules, runtime: RuntimeConfig) -> MLA:
    """A layer whose numbers are the same on every mesh."""
    options = LayerOptions.of(CONFIG, runtime, rules, Kernels())
    mla = MLA(CONFIG.attention, CONFIG.hidden_dim, options, nnx.Rngs(3))
    if rules.mesh is not None:
        state = nnx.state(mla)
        nnx.update(mla, jax.device_put(state, param_shardings(state, rules)))
    return mla


@nnx.jit
def _extend(mla: MLA, x_BTD: Any, pool: LatentPool, view: View) -> tuple[jax.Array, LatentPool]:
    return mla.extend(x_BTD, pool, view, jnp.int32(0))


def a_pool(rules: ShardingRules, dtype: Any, latent_dtype: Any = None) -> LatentPool:
    """Full of what no token has written, and laid out."""
    pool = allocate_pool(
        CONFIG, BATCH * COLUMNS, latent_dtype or dtype, page_size=PAGE, rope_dtype=dtype
    )
    pool = jax.tree.map(lambda x: jnp.full_like(x, 50.0), pool)
    return pool if rules.mesh is None else jax.device_put(pool, rules.sharding(*pool_dims(rules)))


def read(
    rules: ShardingRules,
    dtype: DType,
    sizes: tuple[int, ...],
    latent_dtype: LatentDType | None = None,
) -> list[np.ndarray]:
    """Reads sequences in parts of so many tokens; returns what attention gives of each."""
    runtime = RuntimeConfig(dtype=dtype, remat="none", latent_dtype=latent_dtype)
    mla, rng = an_mla(rules, runtime), np.random.default_rng(2)
    pool = a_pool(rules, jnp.dtype(dtype), mla.options.latent_dtype)
    table = jnp.asarray(rng.permutation(BATCH * COLUMNS).reshape(BATCH, COLUMNS), jnp.int32)
    lengths, outs = jnp.zeros(BATCH, jnp.int32), []
    for size in sizes:
        # Some of a part's tokens are padding, and a sequence may have none.
        count = rng.integers(0 if size > 1 else 1, size + 1, BATCH)
        part = Part(table, lengths, jnp.asarray(count, jnp.int32), size)
        drawn = rng.standard_normal((1, BATCH * size, CONFIG.hidden_dim))
        out, pool = _extend(mla, jnp.asarray(drawn, dtype), pool, View((part,)))
        lengths += part.num_new_B
        outs.append(np.asarray(out.reshape(BATCH, size, -1), np.float32)[np.asarray(part.mask())])
    return outs


# Few tokens are absorbed, eleven are not; each sequence begins anywhere and crosses pages.
SIZES = (1, 11, 3, 11, 1, 3)


def test_devices_that_have_a_part_of_each_page_attend_as_one_does():
    alone = read(ShardingRules(), "float32", SIZES)
    divided = read(rules_of(tensor=4), "float32", SIZES)
    assert all(len(out) for out in alone)
    for got, want in zip(divided, alone, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


def test_in_bfloat16_outputs_and_log_sum_exps_travel_as_bits():
    """They are of different widths there."""
    sizes = (11, 1, 1)
    alone = read(ShardingRules(), "bfloat16", sizes)
    exact = read(ShardingRules(), "float32", sizes)
    divided = read(rules_of(tensor=2), "bfloat16", sizes)
    for got, want, true in zip(divided, alone, exact, strict=True):
        error = np.abs(want - true).max()
        assert 0 < np.abs(got - true).max() < 2 * error


def test_each_device_holds_its_part_of_every_page():
    """Of one sequence of eleven tokens, in pages of eight: those of each position modulo four."""
    rules, one = rules_of(tensor=4), ShardingRules()
    for tokens in (5, 11):
        found = {}
        for each in (rules, one):
            mla = an_mla(each, RuntimeConfig(dtype="float32", remat="none"))
            part = Part(jnp.array([[6, 3]]), jnp.zeros(1, jnp.int32), jnp.array([tokens]), 12)
            x = np.random.default_rng(1).standard_normal((1, 12, CONFIG.hidden_dim), np.float32)
            _, found[each] = _extend(mla, jnp.asarray(x), a_pool(each, "float32"), View((part,)))
        latent = found[rules].pages.latent
        shape = (BATCH * COLUMNS, PAGE // 4, CONFIG.attention.kv_lora_rank)
        assert latent.sharding.shard_shape(latent.shape) == shape
        whole = np.asarray(found[one].pages.latent)[[6, 3]].reshape(2 * PAGE, -1)
        for index, shard in enumerate(sorted(latent.addressable_shards, key=lambda s: s.device.id)):
            own = np.asarray(shard.data)[[6, 3]].reshape(PAGE // 2, -1)
            np.testing.assert_allclose(own, whole[index::4], atol=1e-6)
            assert (own == 50.0).all(axis=1).sum() == PAGE // 2 - len(range(index, tokens, 4))


def sent(num_tokens: int, dtype: DType, count: int) -> dict[str, Any]:
    """Counts what a layer's program sends for a part of so many tokens of each sequence."""
    rules = rules_of(tensor=count)
    mla = an_mla(rules, RuntimeConfig(dtype=dtype, remat="none"))
    part = Part(
        jnp.zeros((BATCH, COLUMNS), jnp.int32),
        jnp.zeros(BATCH, jnp.int32),
        jnp.ones(BATCH, jnp.int32),
        num_tokens,
    )
    x_BTD = jnp.zeros((1, BATCH * num_tokens, CONFIG.hidden_dim), dtype)
    pool = a_pool(rules, jnp.dtype(dtype))
    text = jax.jit(_extend).lower(mla, x_BTD, pool, View((part,))).compile().as_text()
    assert text is not None
    return {kind.split()[0]: use for kind, use in count_collectives(text).items()}


def bytes_of_a_query(attention: AttentionConfig, count: int, itemsize: int) -> tuple[int, int]:
    """What `attend_to_own_tokens` says: of a query, and of its output and log-sum-exp."""
    rank, rope = attention.kv_lora_rank, attention.qk_rope_head_dim
    sizes = (rank + rope) * itemsize, rank * itemsize + 4
    query, output = (attention.num_heads * size * (count - 1) // count for size in sizes)
    return query, output


@pytest.mark.parametrize(
    ("num_tokens", "count", "dtype"), [(1, 2, "float32"), (3, 4, "float32"), (1, 4, "bfloat16")]
)
def test_decoding_sends_queries_and_outputs_and_no_latent(num_tokens, count, dtype):
    """The compiled program's bytes are those of the formula, however long the sequences are."""
    uses = sent(num_tokens, dtype, count)
    assert set(uses) == {"all-gather", "all-to-all", "all-reduce"}  # that of `wo`
    assert uses["all-gather"].executions == uses["all-to-all"].executions == 1
    query, output = bytes_of_a_query(CONFIG.attention, count, jnp.dtype(dtype).itemsize)
    widened = 4 // jnp.dtype(dtype).itemsize  # as XLA's CPU backend does with bfloat16
    assert uses["all-gather"].bytes == BATCH * num_tokens * query * widened
    assert uses["all-to-all"].bytes == BATCH * num_tokens * output


def test_the_released_models_send_what_the_docstring_says():
    assert sum(bytes_of_a_query(deepseek_v2_lite.config.attention, 2, 2)) == 17_440
    assert sum(bytes_of_a_query(deepseek_v2.config.attention, 8, 2)) == 244_160


def test_a_chunk_sends_latents_and_no_query():
    """A block of the cached tokens at a time, C + R numbers each."""
    uses = sent(11, "float32", 4)
    assert set(uses) == {"all-gather", "all-reduce"}
    attention = CONFIG.attention
    numbers = attention.kv_lora_rank + attention.qk_rope_head_dim
    tokens = BATCH * COLUMNS * PAGE  # all columns of the table, one after the other
    assert uses["all-gather"].bytes == tokens * numbers * 4 * 3 // 4


def test_pages_are_divided_as_heads_are():
    """Else the devices that gather queries would not be those that have the pages."""
    mesh = make_mesh(MeshConfig(fsdp=1, expert=2, tensor=4))
    for rules in (train_rules(mesh), inference_rules(mesh), serving_rules(mesh)):
        assert rules.axes("page_tokens") == rules.axes("heads")
