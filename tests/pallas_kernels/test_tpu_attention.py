"""Latent attention's TPU kernels: values and gradients simulated on the CPU, and compilation."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mla_attention import mla_attention, tiles, tpu
from pallas_kernels.mla_attention import tpu_blocks as blocks
from pallas_kernels.mla_attention.arguments import Inputs, Masks
from pallas_kernels.mla_attention.cases import CASES, Case
from tests import oracle_attention
from tests.conftest import require_module
from tests.oracle_attention import relative_error
from tests.pallas_kernels.attention_parts import CASE as PARTS
from tests.pallas_kernels.attention_parts import check_parts
from tests.pallas_kernels.comparisons import GRADIENTS, compare_attention
from tests.pallas_kernels.tpu_programs import compile_programs
from tests.pallas_kernels.tpu_simulator import without_races
from tests.tpu_compiler import TOPOLOGIES

# Several blocks and several chunks of each, at lengths that a simulator can do.
FORWARD = dataclasses.replace(tiles.TPU_FORWARD, block=256, chunk_q=128, chunk_k=128)
BACKWARD = dataclasses.replace(tiles.TPU_BACKWARD, block=256, part=128, chunk_q=128, chunk_k=128)


def simulate(case, arrays, masks, d_out, forward, backward, resident_tokens):
    """Returns (out, lse, grads) from the simulator of a TPU."""
    options = {
        "scale": case.scale,
        "causal": case.causal,
        "interpret": pltpu.InterpretParams(detect_races=True),
    }
    inputs, masks = Inputs(*arrays), Masks(*masks)
    out, lse = without_races(tpu.forward(inputs, masks, tile=forward, **options))
    options |= {"tile": backward, "resident_tokens": resident_tokens}
    return out, lse, without_races(tpu.backward(inputs, masks, out, lse, d_out, **options))


def check(
    case,
    dtype,
    tolerance,
    seed,
    forward=FORWARD,
    backward=BACKWARD,
    resident_tokens=tiles.TPU_RESIDENT_TOKENS,
):
    arrays, masks, d_out = case.draw(seed, dtype)
    results = simulate(case, arrays, masks, d_out, forward, backward, resident_tokens)
    compare_attention(case, arrays, masks, d_out, results, tolerance)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bfloat16(case):
    check(case, jnp.bfloat16, 5e-3, seed=len(case.name))


def test_parts_of_the_keys_add_up():
    """Of every second token's queries, as devices have them that divide a row."""
    case = dataclasses.replace(PARTS, batch=1, heads=1, queries=70, keys=140)
    interpret: Any = pltpu.InterpretParams()
    options: dict[str, Any] = {"scale": case.scale, "causal": True, "interpret": interpret}

    @jax.jit  # compiled once for both parts
    def forward(inputs, masks):
        return tpu.forward(Inputs(*inputs), Masks(*masks), tile=FORWARD, **options)

    @jax.jit
    def backward(inputs, masks, out, lse, d_out):
        arguments = Inputs(*inputs), Masks(*masks), out, lse, d_out
        return tpu.backward(*arguments, tile=BACKWARD, **options)

    check_parts(0, 6, jnp.bfloat16, 5e-3, forward, backward, case)


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_tiles_held_between_steps(lag):
    """The forward kernel of v5e and v5p, whose steps finish all their tiles, and two that hold."""
    tile = dataclasses.replace(FORWARD, lag=lag)
    case = Case("held", queries=300, keys=300, num_segments=2)
    check(case, jnp.bfloat16, 5e-3, seed=5, forward=tile)


@pytest.mark.parametrize("case", [CASES[7], CASES[17], CASES[18]], ids=lambda case: case.name)
def test_float32(case):
    check(case, jnp.float32, 1e-5, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case("1536", queries=1536, keys=1536),
        Case("600_full", queries=600, keys=1000, heads=1, causal=False),
    ],
    ids=lambda case: case.name,
)
def test_tiles_of_the_table(case):
    """The sizes that are used on a chip: whole blocks, diagonal blocks, ragged ones."""
    check(case, jnp.bfloat16, 5e-3, seed=2, forward=None, backward=None)


@pytest.mark.parametrize(("queries", "keys"), [(1, 129), (128, 256), (1024, 300)])
@pytest.mark.parametrize("mask", ["segments", "offset", "full"])
def test_blocks_that_are_no_squares(queries, keys, mask):
    """A chunk of a prompt over more keys than it has queries, with the sizes used on a chip."""
    case = Case(
        "chunk",
        queries=queries,
        keys=keys,
        causal=mask != "full",
        num_segments=2 if mask != "offset" else 0,
        offsets=(max(0, keys - queries),) if mask == "offset" else (),
    )
    arrays, masks, d_out = case.draw(7, jnp.bfloat16)
    if mask == "offset" and queries < 1024:
        check(case, jnp.bfloat16, 5e-3, seed=7, forward=None, backward=None)
        return

    def both(inputs, masks, d_out):
        options: dict[str, Any] = {"scale": case.scale, "causal": case.causal}
        out, lse = tpu.forward(inputs, masks, **options)
        return tpu.backward(inputs, masks, out, lse, d_out, **options)

    grads = jax.eval_shape(both, Inputs(*arrays), Masks(*masks), d_out)
    assert [grad.shape for grad in grads] == [array.shape for array in arrays]


@pytest.mark.parametrize(
    "case",
    [
        Case("causal", queries=300, keys=300),
        Case("offset", queries=300, keys=200, num_segments=2, offsets=(40,)),
    ],
    ids=lambda case: case.name,
)
def test_backward_in_pieces(case):
    """Sequences that are too long for VMEM: the sum over pieces."""
    check(case, jnp.bfloat16, 5e-3, seed=3, resident_tokens=128)


def test_transformations():
    """The public function under vmap, its kernels simulated, and traced under checkpoint."""
    case = Case("t", batch=2, queries=70, keys=70)
    arrays, _, d_out = case.draw(4, jnp.bfloat16)

    def attend(*arrays):
        return mla_attention(*arrays, scale=case.scale, implementation="tpu")

    def mapped(*arrays):
        split = [x[:, None] for x in arrays]
        return jax.vmap(attend)(*split)[:, 0]

    with pltpu.force_tpu_interpret_mode():
        out, pullback = jax.vjp(mapped, *arrays)
        grads = pullback(d_out)
    # Checkpoint does not take the simulator's callbacks, so there only the shapes are worked out.
    remat = jax.grad(lambda *x: jnp.sum(jax.checkpoint(attend)(*x).astype(jnp.float32)), range(5))
    shapes = [grad.shape for grad in jax.eval_shape(remat, *arrays)]
    assert shapes == [array.shape for array in arrays]
    inputs: tuple[Any, ...] = (*arrays, None, None, None, d_out)
    want_out, _, want_grads = oracle_attention.attend(*inputs, scale=case.scale, causal=True)
    assert relative_error(out, want_out) < 5e-3
    for name, grad, want in zip(GRADIENTS, grads, want_grads, strict=True):
        assert relative_error(grad, want) < 5e-3, name


@pytest.mark.parametrize("keys_outer", [False, True])
def test_table_lists_what_is_visible(keys_outer):
    """Causal blocks: each once, none above the diagonal, only those on it masked."""
    table = blocks.make_table(
        1000, 1000, 256, 256, (None, None, None), causal=True, keys_outer=keys_outer
    )
    q, k, info, _ = table.scalars
    assert table.steps == 4 * 5 // 2
    assert {(int(i), int(j)) for i, j in zip(q, k, strict=True)} == {
        (i, j) for i in range(4) for j in range(i + 1)
    }
    kinds = np.where(q == k, blocks.DIAGONAL, blocks.FULL)
    np.testing.assert_array_equal(info & blocks.KIND_BITS, kinds)
    outer = k if keys_outer else q
    assert (np.diff(outer) >= 0).all()
    np.testing.assert_array_equal(
        (info & blocks.OUTER_FIRST) != 0, np.r_[True, np.diff(outer) != 0]
    )
    np.testing.assert_array_equal((info & blocks.OUTER_LAST) != 0, np.r_[np.diff(outer) != 0, True])


def test_table_skips_other_documents():
    """Packed documents: blocks without a common document are not computed."""
    ids = jnp.asarray(np.repeat(np.arange(4), 256)[None], jnp.int32)
    table = blocks.make_table(1024, 1024, 256, 256, (ids, ids, None), causal=True, keys_outer=False)
    kinds = np.asarray(table.scalars[2]) & blocks.KIND_BITS
    assert (kinds == blocks.DIAGONAL).sum() == 4
    # The first block of keys is listed for each block of queries, so that its output is written.
    assert (kinds == blocks.SKIP).sum() == table.steps - 4


def test_errors_name_the_argument():
    arrays, _, _ = Case("e", queries=4, keys=4).draw(6, dims=(16, 64, 128))
    with pytest.raises(ValueError, match="nope dim 16 must be 128"):
        mla_attention(*arrays, scale=1.0, implementation="tpu")
    arrays, _, _ = Case("e", queries=4, keys=4).draw(6, jnp.float16)
    with pytest.raises(ValueError, match="dtype float16 must be bfloat16 or float32"):
        mla_attention(*arrays, scale=1.0, implementation="tpu")


@pytest.mark.slow
@pytest.mark.tpu_program
def test_compiles_for_every_chip():
    """With libtpu's compiler; the temporary memory holds no scores."""
    require_module("libtpu")
    results = compile_programs("attention", ",".join(TOPOLOGIES))
    assert {result["chip"] for result in results} == set(TOPOLOGIES)
    both = {"mla_attention_forward", "mla_attention_backward"}
    for result in results:
        training = result["program"] != "v2_lite_prefill"
        assert set(result["kernels"]) == (both if training else {"mla_attention_forward"}), result
        if result["program"] == "v2_training":
            inputs = 4096 * 128 * (3 * 128 + 64) * 2
            scores = 128 * 4096 * 4096 * 2
            assert result["temporary"] < 4 * inputs < scores, result


@pytest.mark.slow
@pytest.mark.tpu_program
def test_compiles_within_shard_map():
    """Sequences and heads over four chips: attention with its gradient, and decode."""
    require_module("libtpu")
    results = compile_programs("sharded", "v6e")
    kernels = {result["program"]: sorted(set(result["kernels"])) for result in results}
    assert kernels == {
        "training": ["mla_attention_backward", "mla_attention_forward"],
        "decode": ["mla_decode"],
    }
