"""Reading tokens part by part into the latent pool, against one forward pass over all of them."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.cache import Part, View, allocate_pool
from dsjax.config import MeshConfig
from dsjax.configs.models import deepseek_v2, deepseek_v2_lite
from dsjax.kernels import Kernels
from dsjax.layers.attention.latent import _cut
from dsjax.mesh import inference_rules, make_mesh, serving_rules
from tests.dsjax.sequences import Sequences
from tests.small_models import SMALL, SMALL_LITE, random_model

LENGTH = 60
SPREAD = 1.0  # at most the standard deviation of the logits of the models here
# Sizes for which the forms cross at 8 tokens, so that short parts are absorbed and long ones not.
CROSSING = replace(
    SMALL,
    max_length=LENGTH,
    attention=replace(SMALL.attention, kv_lora_rank=24, qk_nope_head_dim=6, v_head_dim=6),
)
MODELS = {
    "v2": CROSSING,
    "v2_lite": replace(SMALL_LITE, attention=replace(CROSSING.attention, q_lora_rank=None)),
}
forward = jax.jit(lambda model, tokens: model(tokens))


@functools.cache
def model_and_logits(name: str):
    """A model, tokens of five sequences, and their logits by the forward pass."""
    model = random_model(MODELS[name])
    tokens = np.random.default_rng(5).integers(0, SMALL.vocab_size, (5, LENGTH)).astype(np.int32)
    want = np.asarray(forward(model, tokens))
    assert want.std() > SPREAD
    return model, tokens, want


def assert_close(got, want):
    """To 1e-4 of the standard deviation of the logits."""
    assert np.abs(np.asarray(got) - want).max(initial=0) <= 1e-4 * SPREAD


# The parts of a row: sequences, tokens of each, and whether they begin there. The forms cross at 12
# tokens; every part has its turn with fewer tokens, or with none.
PARTS = {
    "first": (1, 16, True),
    "decode": (3, 3, False),
    "short": (1, 5, False),
    "long": (2, 16, False),
}


@pytest.mark.core
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", MODELS)
def test_any_split_into_parts_equals_the_forward_pass(name, seed):
    """Prompts from nothing, chunks after a prefix and 1 to 3 tokens at a time, mixed in a row."""
    model, tokens, want = model_and_logits(name)
    rng = np.random.default_rng(seed)
    sequences = Sequences(model, 5, LENGTH)
    ends = rng.integers(20, LENGTH + 1, 5)
    fed = dict.fromkeys(PARTS, 0)
    while (left := ends - sequences.lengths).any():
        waiting = list(rng.permutation(np.flatnonzero(left)))
        parts, rows, counts = [], [], []
        for kind, (slots, size, is_first) in PARTS.items():
            fit = [row for row in waiting if not (is_first and sequences.lengths[row])]
            taken = fit[: rng.integers(slots + 1)]
            waiting = [row for row in waiting if row not in taken]
            rows.append(taken + [0] * (slots - len(taken)))
            counts.append([min(rng.integers(1, size + 1), left[row]) for row in taken])
            counts[-1] += [0] * (slots - len(taken))
            parts.append(sequences.part(rows[-1], counts[-1], size, is_first=is_first))
            fed[kind] += sum(counts[-1])
        starts = sequences.lengths.copy()
        found = sequences.extend(parts, rows, tokens)
        for index, count, logits in zip(rows, counts, found, strict=True):
            for place, (row, number) in enumerate(zip(index, count, strict=True)):
                end = starts[row] + number
                assert_close(logits[place, :number], want[row, starts[row] : end])
    np.testing.assert_array_equal(sequences.lengths, ends)
    assert all(fed.values())


@pytest.mark.parametrize("name", MODELS)
def test_token_by_token_equals_the_forward_pass(name):
    """From an empty pool, over page borders."""
    model, tokens, want = model_and_logits(name)
    sequences = Sequences(model, 5, LENGTH)
    for step in range(24):
        assert_close(sequences.step(tokens, [1] * 5)[:, 0], want[:, step])


@pytest.mark.core
@pytest.mark.parametrize(
    "kernels",
    [
        Kernels(),
        Kernels(experts_in_place=True),
        Kernels(experts_in_place=True, shared_beside=50, unroll_decode=True, compare_few=True),
    ],
    ids=["sliced", "in_place", "as_on_gpus"],
)
def test_a_layers_experts_may_be_read_where_they_lie(kernels):
    """Cut out of those of all layers by the scan, or read there."""
    _, tokens, want = model_and_logits("v2")
    model = random_model(CROSSING, kernels=kernels)
    sequences = Sequences(model, 5, LENGTH)
    counts = [13, 5, 8, 1, 20]
    logits = sequences.step(tokens, counts, is_first=True)
    for row, count in enumerate(counts):
        assert_close(logits[row, :count], want[row, :count])
    assert_close(sequences.step(tokens, [1] * 5)[:, 0], want[np.arange(5), counts])


@pytest.mark.core
@pytest.mark.parametrize("least", [16, 8, 1])
def test_a_long_prefix_is_expanded_block_by_block(least: int):
    """With blocks of two pages, or one: a prefix of none, of less than one, and of several."""
    _, tokens, want = model_and_logits("v2")
    model = random_model(CROSSING, kernels=Kernels(expanded_keys=least))
    sequences = Sequences(model, 5, LENGTH)
    counts = [1, 7, 16, 33, 40]
    sequences.step(tokens, counts, is_first=True)
    logits = sequences.step(tokens, [16] * 5)
    for row, start in enumerate(counts):
        assert_close(logits[row], want[row, start : start + 16])


def test_devices_that_divide_heads_and_experts_give_the_same_logits():
    """Prompts, then a token each, then chunks that expand what is cached."""
    config = replace(CROSSING, attention=replace(CROSSING.attention, num_heads=4))
    tokens = np.random.default_rng(5).integers(0, config.vocab_size, (3, 40)).astype(np.int32)
    want = np.asarray(forward(random_model(config), tokens))
    rules = inference_rules(make_mesh(MeshConfig(fsdp=1, expert=4, tensor=2)))
    sequences = Sequences(random_model(config, rules=rules), 3, LENGTH)
    for counts, is_first in (([13, 5, 16], True), ([1] * 3, False), ([16] * 3, False)):
        starts = sequences.lengths.copy()
        logits = sequences.step(tokens, counts, is_first=is_first)
        for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
            assert_close(logits[row, :count], want[row, start : start + count])


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_devices_with_pages_of_their_own_give_the_same(name):
    """Four rows of two sequences, whose pages each two devices know; tokens travel to experts."""
    _, tokens, want = model_and_logits(name)
    rules = serving_rules(make_mesh(MeshConfig(data=2, fsdp=1, expert=2, tensor=2)))
    model = random_model(MODELS[name], rules=rules)
    pool = allocate_pool(model.config, 16, jnp.float32, page_size=8, num_shards=4)
    place = lambda x: jax.device_put(x, rules.sharding("pages", None, None))  # noqa: E731
    pool = replace(pool, pages=jax.tree.map(place, pool.pages))
    texts = np.array([0, 1, 2, 3, 4, 0, 1, 2])  # of the sequences; two a row
    rng = np.random.default_rng(3)
    table = np.stack([rng.permutation(16).reshape(2, 8) for _ in range(4)]).reshape(8, 8)
    lengths, extend = np.zeros(8, np.int32), jax.jit(lambda *arguments: model.extend(*arguments))
    # A prompt's beginning, then every first sequence reads on while the second decodes.
    for sizes in ((16, 16), (16, 1), (16, 2), (5, 1)):
        parts: list[Part] = []
        rows: list[np.ndarray] = []
        for which, size in enumerate(sizes):
            index = np.arange(which, 8, 2)
            counts = np.minimum(size, LENGTH - lengths[index])
            pages, cached, new = (
                jnp.asarray(x, jnp.int32) for x in (table[index], lengths[index], counts)
            )
            parts.append(Part(pages, cached, new, size, is_first=sizes == (16, 16)))
            padded = np.pad(tokens[texts[index]], ((0, 0), (0, 16)))
            rows.append(np.stack([padded[i, lengths[at] :][:size] for i, at in enumerate(index)]))
        flat = jnp.asarray(np.concatenate(rows, axis=1).reshape(-1))
        found, pool = extend(flat, pool, View(tuple(parts), 4), jnp.arange(flat.size))
        logits = np.asarray(found).reshape(4, sum(sizes), -1)
        for at in range(8):
            first, start = (at % 2) * sizes[0], lengths[at]
            count = int(parts[at % 2].num_new_B[at // 2])
            expected = want[texts[at], start : start + count]
            assert_close(logits[at // 2, first : first + count], expected)
            lengths[at] += count
    shard = pool.pages.latent.sharding.shard_shape(pool.pages.latent.shape)
    assert shard[0] == 16 * SMALL.num_layers


def test_only_the_wanted_places_have_logits():
    model, tokens, want = model_and_logits("v2")
    pool = allocate_pool(CROSSING, 3, jnp.float32, page_size=8)
    part = Part(jnp.arange(3)[None], jnp.zeros(1, jnp.int32), jnp.array([20]), 20, is_first=True)
    wanted = jnp.array([19, 3])
    logits, _ = jax.jit(lambda *arguments: model.extend(*arguments))(
        jnp.asarray(tokens[0, :20]), pool, View((part,)), wanted
    )
    assert logits.shape == (2, SMALL.vocab_size)
    assert_close(logits, want[0, [19, 3]])


def test_a_decode_step_layer_by_layer_is_the_loop_over_them():
    """As GPUs run it; and no stack is sliced in a loop there, which would be a copy."""
    _, tokens, want = model_and_logits("v2")
    sequences = Sequences(random_model(CROSSING, kernels=Kernels(unroll_decode=True)), 3, LENGTH)
    for counts, is_first in (([13, 5, 16], True), ([1] * 3, False), ([2, 1, 2], False)):
        starts = sequences.lengths.copy()
        logits = sequences.step(tokens, counts, is_first=is_first)
        for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
            assert_close(logits[row, :count], want[row, start : start + count])
    assert " scan[" in program_of(CROSSING, 1)
    assert " scan[" not in program_of(CROSSING, 1, Kernels(unroll_decode=True))
    assert " scan[" in program_of(CROSSING, 16, Kernels(unroll_decode=True))


@pytest.mark.parametrize("num_decoding", [1, 2])
def test_a_part_that_begins_off_alignment_is_copied_for_its_kernel(num_decoding):
    """Rotary keys of 64 bfloat16 numbers are 128 bytes a token; Mosaic wants multiples of 256."""
    part = Part(jnp.zeros((1, 1), jnp.int32), jnp.zeros(1, jnp.int32), jnp.array([8]), 8)
    row = jnp.zeros((1, num_decoding + 8, 64), jnp.bfloat16)
    program = str(jax.make_jaxpr(lambda row: _cut(row, part, num_decoding))(row))
    assert ("optimization_barrier" in program) == (num_decoding == 1)


def program_of(config, num_tokens, kernels=None):
    """The jaxpr of one part of two sequences after up to 640 cached tokens."""
    model = random_model(config, kernels=kernels)
    pool = allocate_pool(config, 20, jnp.float32)
    part = Part(
        jnp.arange(20).reshape(2, 10),
        jnp.full(2, 100),
        jnp.full(2, num_tokens),
        num_tokens,
    )
    tokens = jnp.zeros(part.total_tokens, int)
    run = jax.make_jaxpr(lambda *arguments: model.extend(*arguments))
    return str(run(tokens, pool, View((part,)), jnp.arange(2)))


def expands(jaxpr, config):
    """Whether per-head keys or values of cached tokens stand in a program."""
    attention = config.attention
    widths = (attention.qk_nope_head_dim, attention.v_head_dim)
    return any(
        f"{tokens},{attention.num_heads},{width}]" in jaxpr
        for tokens in (64, 640)  # of a page, and of all a table's pages in one block
        for width in widths
    )


def test_a_longer_piece_has_longer_blocks():
    """Each block is a turn of a loop and a merge of all queries."""
    config = replace(SMALL, num_layers=1, moe=None)
    attention = config.attention
    of_keys = f",{attention.num_heads},{attention.v_head_dim}]"
    program = program_of(config, 1024, Kernels(expanded_keys=64))
    assert f"512{of_keys}" in program
    assert f"64{of_keys}" not in program


@pytest.mark.core
def test_decoding_expands_nothing():
    """Trap: decoding that expands the whole cache again at each step."""
    config = replace(SMALL, num_layers=1, moe=None)
    for num_tokens in (1, 4):
        assert not expands(program_of(config, num_tokens), config)
    # A long chunk does expand what is cached, which shows that it would have been seen.
    kernels = Kernels(expanded_keys=640)
    assert expands(program_of(config, 64, kernels), config)


def test_the_pool_of_the_released_models_holds_576_numbers_a_token():
    for config in (deepseek_v2.config, deepseek_v2_lite.config):
        pool = jax.eval_shape(functools.partial(allocate_pool, config, 1, jnp.bfloat16))
        sizes = [leaf.size for leaf in jax.tree.leaves(pool.pages)]
        assert sum(sizes) == config.num_layers * 64 * 576


def test_the_pool_for_the_tpu_kernel_has_rotary_keys_of_whole_lanes():
    allocate = functools.partial(allocate_pool, deepseek_v2_lite.config, 1, jnp.bfloat16)
    for kernel, lanes in (("tpu", 128), ("hopper", 64)):
        pages = jax.eval_shape(functools.partial(allocate, decode_kernel=kernel)).pages
        assert pages.rope.shape == (deepseek_v2_lite.config.num_layers, 64, lanes)
