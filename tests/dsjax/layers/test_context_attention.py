"""Attention where devices divide the row: what it gives, and what travels."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.config import MeshConfig
from dsjax.layers.attention.context import Row, Settings, attend_over_row
from dsjax.mesh import from_stripes, make_mesh, to_stripes, train_rules
from pallas_kernels.mla_attention import mla_attention
from tests.oracle_attention import relative_error

BATCH, LENGTH, HEADS, NOPE, ROPE, VALUE, RANK = 2, 96, 2, 12, 8, 10, 16
SCALE = 0.3
HEADS_DIMS: Any
SHARED: Any
WEIGHT: Any
HEADS_DIMS, SHARED = ("batch", "length", "heads", "head_dim"), ("batch", "length", "head_dim")
WEIGHT = ("kv_latent", "heads", "head_dim")
DIMS = Row(HEADS_DIMS, HEADS_DIMS, SHARED, SHARED, WEIGHT, WEIGHT)


def draw(seed: int, dtype: Any = jnp.float32) -> tuple[Row, np.ndarray, jax.Array]:
    """Whole rows with documents of any lengths and perhaps padding, and the output's gradient."""
    rng = np.random.default_rng(seed)
    shapes = (
        (BATCH, LENGTH, HEADS, NOPE),
        (BATCH, LENGTH, HEADS, ROPE),
        (BATCH, LENGTH, RANK),
        (BATCH, LENGTH, ROPE),
        (RANK, HEADS, NOPE),
        (RANK, HEADS, VALUE),
        (BATCH, LENGTH, HEADS, VALUE),
    )
    *arrays, d_out = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
    ids = np.zeros((BATCH, LENGTH), np.int32)
    for row in ids:
        cuts = np.sort(rng.choice(LENGTH, rng.integers(0, 9), replace=False))
        row[:] = 1 + np.searchsorted(cuts, np.arange(LENGTH), side="right")
        row[LENGTH - rng.integers(0, 20) :] = 0
    return Row(*arrays), ids, d_out


@jax.jit
def on_one_device(row: Row, ids: Any, d_out: jax.Array) -> Any:
    def attend(row: Row) -> jax.Array:
        return mla_attention(
            row.q_nope_BTHN,
            row.q_rope_BTHR,
            jnp.einsum("BTC,CHN->BTHN", row.latent_BTC, row.wk_b),
            row.k_rope_BTR,
            jnp.einsum("BTC,CHV->BTHV", row.latent_BTC, row.wv_b),
            scale=SCALE,
            q_segment_ids_BT=ids,
            kv_segment_ids_BS=ids,
            implementation="reference",
        )

    out, pull = jax.vjp(attend, row)
    return out, pull(d_out)[0]


@functools.cache
def divided(transport: str, packed: bool, shards: int) -> tuple[Any, Any]:
    """The same over devices, jitted, and its rules."""
    mesh = MeshConfig(data=2, fsdp=1, context=shards)
    rules = train_rules(make_mesh(mesh, jax.devices()[: 2 * shards]))
    settings = Settings("context", transport, SCALE, "xla")
    attend = rules.shard_map(
        functools.partial(attend_over_row, settings),
        (DIMS, ("batch", "length") if packed else None),
        HEADS_DIMS,
    )

    @jax.jit
    def run(row: Row, ids: Any, d_out: jax.Array) -> Any:
        out, pull = jax.vjp(lambda row: attend(row, ids), row)
        return out, pull(d_out)[0]

    return run, rules


def lay_out(rules: Any, row: Row, ids: Any, d_out: jax.Array) -> Any:
    shards = rules.num_shards("length")

    def put(array: Any, dims: Any) -> Any:
        if array is None:
            return None
        striped = to_stripes(array, shards) if "length" in dims else array
        return jax.device_put(striped, rules.sharding(*dims))

    laid_out = Row(*(put(x, dims) for x, dims in zip(row, DIMS, strict=True)))
    return laid_out, put(ids, ("batch", "length")), put(d_out, HEADS_DIMS)


def compare(transport: str, packed: bool, shards: int, seed: int, tolerance: float, dtype: Any):
    row, drawn_ids, d_out = draw(seed, dtype)
    ids = drawn_ids if packed else None
    run, rules = divided(transport, packed, shards)
    out, gradients = run(*lay_out(rules, row, ids, d_out))
    want, want_gradients = on_one_device(row, ids, d_out)
    assert out.dtype == dtype
    assert relative_error(from_stripes(out, shards), want) < tolerance
    for name, got, dims in zip(Row._fields, gradients, DIMS, strict=True):
        got = from_stripes(got, shards) if "length" in dims else got
        assert relative_error(got, getattr(want_gradients, name)) < tolerance, name


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("transport", "shards"), [("gather", 4), ("ring", 4), ("ring", 2)])
def test_devices_that_divide_a_row_attend_as_one_does(transport, shards, packed):
    for seed in range(8 if packed else 2):  # documents of other lengths, one program
        compare(transport, packed, shards, seed, 1e-5, jnp.float32)


@pytest.mark.parametrize("transport", ["gather", "ring"])
def test_bfloat16_is_as_near_as_one_devices(transport):
    """Partial outputs are rounded before they are merged, gradients before they are sent."""
    compare(transport, True, 4, 3, 1e-2, jnp.bfloat16)


def test_the_order_matters():
    """The control: rows in the order of the text, which are not striped, come out wrong."""
    row, ids, d_out = draw(0)
    run, rules = divided("gather", True, 4)
    out, _ = run(*lay_out(rules, row, ids, d_out))
    want, _ = on_one_device(row, ids, d_out)
    assert relative_error(from_stripes(out, 4), want) < 1e-5
    assert relative_error(out, want) > 0.1


@pytest.mark.parametrize("transport", ["gather", "ring"])
def test_a_gpus_kernels_are_in_the_program(transport):
    """Hopper's, forward and backward, one for the parts of all devices or two around a ring."""
    rules = train_rules(make_mesh(MeshConfig(fsdp=1, context=4), jax.devices()[:4]))
    settings = Settings("context", transport, SCALE, "hopper")
    attend = rules.shard_map(
        functools.partial(attend_over_row, settings), (DIMS, ("batch", "length")), HEADS_DIMS
    )
    row = ("batch", "length")
    widths = ((512, 2, 128), (512, 2, 64), (512, 512), (512, 64))
    shapes = [(1, *width) for width in widths] + [(512, 2, 128)] * 2
    leaves: Any = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=rules.sharding(*dims))
        for shape, dims in zip(shapes, DIMS, strict=True)
    ]
    ids = jax.ShapeDtypeStruct((1, 512), jnp.int32, sharding=rules.sharding(*row))

    def loss(arrays: Row, ids: jax.Array) -> jax.Array:
        return jnp.sum(attend(arrays, ids).astype(jnp.float32))

    lowered = jax.jit(jax.grad(loss)).trace(Row(*leaves), ids).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    sends = "all_gather" if transport == "gather" else "collective_permute"
    assert text.count(f'"stablehlo.{sends}"') >= 2
    assert len(re.findall(r"custom_call @\w*mosaic_gpu\w*", text)) >= 2
