"""`supported` of every op against the implementations: None where they trace, else their error."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    chips,
    expert_exchange,
    expert_permute,
    grouped_matmul,
    mla_attention,
    mla_decode,
)

DRAWS = 12
OPS = (expert_permute, grouped_matmul, mla_attention, mla_decode)
# Of dims, what the kernels take comes most often, so that some draws fit in all of them.
DTYPES = ("bfloat16", "bfloat16", "bfloat16", "float32", "float16")


def struct(*shape, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def draw_attention(rng):
    sizes: dict[str, Any] = {
        "nope_dim": int(rng.choice([128, 128, 128, 64])),
        "rope_dim": int(rng.choice([64, 64, 64, 32])),
        "value_dim": int(rng.choice([128, 128, 128, 192])),
        "dtype": str(rng.choice(DTYPES)),
    }
    B, T, S, H = (int(rng.integers(1, most)) for most in (3, 200, 200, 5))
    N, R, V = sizes["nope_dim"], sizes["rope_dim"], sizes["value_dim"]
    shapes = ((B, T, H, N), (B, T, H, R), (B, S, H, N), (B, S, R), (B, S, H, V))
    arrays = [struct(*shape, dtype=sizes["dtype"]) for shape in shapes]

    def call(implementation, *arrays):
        def loss(*arrays):
            out = mla_attention.mla_attention(*arrays, scale=0.1, implementation=implementation)
            return out.astype(jnp.float32).sum()

        return jax.grad(loss, argnums=range(5))(*arrays)

    return sizes, call, arrays


def draw_decode(rng):
    dtype = str(rng.choice(DTYPES))
    pages_dtype = str(rng.choice([dtype, dtype, "int8", "float8_e4m3fn"]))
    sizes: dict[str, Any] = {
        "kv_rank": int(rng.choice([512, 512, 512, 512, 384, 100])),
        "rope_dim": int(rng.choice([64, 64, 64, 64, 128, 32])),
        "num_heads": int(rng.choice([16, 32, 128, 4])),
        "num_tokens": int(rng.choice([1, 1, 2, 5])),
        "page_size": int(rng.choice([64, 64, 128, 192, 32, 16])),
        "dtype": dtype,
        "pages_dtype": pages_dtype,
    }
    B, P = int(rng.integers(1, 4)), int(rng.choice([3, 8, 200_000], p=[0.5, 0.4, 0.1]))
    C, R, T, H = (sizes[name] for name in ("kv_rank", "rope_dim", "num_tokens", "num_heads"))
    pool = (B * P, sizes["page_size"])
    quantised = jnp.dtype(pages_dtype).itemsize == 1
    pages = mla_decode.LatentPages(
        struct(*pool, C, dtype=pages_dtype),
        struct(*pool, R, dtype=dtype),
        struct(*pool, dtype="float32") if quantised else None,
    )
    arrays = (
        struct(B, T, H, C, dtype=dtype),
        struct(B, T, H, R, dtype=dtype),
        pages,
        struct(B, P, dtype="int32"),
        struct(B, dtype="int32"),
    )

    def call(implementation, *arrays):
        return mla_decode.mla_decode(*arrays, scale=0.1, implementation=implementation)

    return sizes | {"table_pages": P}, call, arrays


def draw_grouped(rng):
    dtype = str(rng.choice(DTYPES))
    weights_dtype = str(rng.choice([dtype, dtype, "int8"]))
    sizes: dict[str, Any] = {
        "width_in": int(rng.choice([128, 256, 512, 192, 352, 100])),
        "width_out": int(rng.choice([128, 256, 384, 64, 320, 352])),
        "dtype": dtype,
        "weights_dtype": weights_dtype,
        "transpose_rhs": bool(rng.integers(2)),
    }
    M, G = int(rng.integers(1, 300)), int(rng.integers(1, 9))
    K, N = sizes["width_in"], sizes["width_out"]
    dims = (N, K) if sizes["transpose_rhs"] else (K, N)
    rhs = struct(G, *dims, dtype=weights_dtype)
    quantised = weights_dtype == "int8"
    if quantised:
        scales = struct(G, *(-(-n // 128) for n in dims), dtype="float32")
        rhs = grouped_matmul.BlockScaledWeights(rhs, scales)

    def call(implementation, lhs, rhs, group_sizes):
        def product(lhs, rhs):
            return grouped_matmul.grouped_matmul(
                lhs,
                rhs,
                group_sizes,
                transpose_rhs=sizes["transpose_rhs"],
                implementation=implementation,
            )

        if quantised:
            return product(lhs, rhs)
        out, pull = jax.vjp(product, lhs, rhs)
        return pull(out)

    return sizes, call, (struct(M, K, dtype=dtype), rhs, struct(G, dtype="int32"))


def draw_permute(rng):
    sizes: dict[str, Any] = {
        "width": int(rng.choice([128, 384, 640, 64, 200])),
        "dtype": str(rng.choice(DTYPES)),
    }
    N, K, E = (int(rng.integers(1, most)) for most in (40, 4, 9))

    def call(implementation, x_ND, gates_NK, indices_NK):
        order = expert_permute.sort_by_expert(indices_NK, E)

        def both(x_ND, gates_NK):
            rows_MD = expert_permute.gather_rows(x_ND, order, implementation=implementation)
            return expert_permute.combine_rows(
                rows_MD, gates_NK, order, implementation=implementation
            )

        out_ND, pull = jax.vjp(both, x_ND, gates_NK)
        return pull(out_ND)

    arrays = (
        struct(N, sizes["width"], dtype=sizes["dtype"]),
        struct(N, K, dtype="float32"),
        struct(N, K, dtype="int32"),
    )
    return sizes, call, arrays


DRAW = {
    mla_attention: draw_attention,
    mla_decode: draw_decode,
    grouped_matmul: draw_grouped,
    expert_permute: draw_permute,
}
PAIRS = [(op, name) for op in OPS for name in op.IMPLEMENTATIONS]


def name_of(value):
    return value if isinstance(value, str) else value.__name__.rpartition(".")[2]


@pytest.mark.parametrize(("op", "implementation"), PAIRS, ids=name_of)
@pytest.mark.usefixtures("unchecked_annotations")
def test_takes_what_it_says(op, implementation, rng):
    """Random sizes trace forward and backward, or raise what `supported` says."""
    outcomes = set()
    for _ in range(DRAWS):
        sizes, call, arrays = DRAW[op](rng)
        reason = op.supported(implementation, **sizes)
        outcomes.add(reason is None)
        trace = functools.partial(jax.eval_shape, functools.partial(call, implementation), *arrays)
        if reason is None:
            trace()
        else:
            want = f"implementation: '{implementation}' does not take this: {reason}"
            with pytest.raises(ValueError, match=re.escape(want)):
                trace()
    if implementation in ("tpu", "hopper"):
        assert outcomes == {True, False}  # the draws hold both kinds


# The corners of what the Hopper kernels take: the least rows and widths, tiles that are not full.
LOWERED = {
    mla_decode: {"num_heads": 32, "num_tokens": 5, "page_size": 192},
    grouped_matmul: {"width_in": 192, "width_out": 64},
    expert_permute: {"width": 128},
}


@pytest.mark.slow
@pytest.mark.parametrize("op", LOWERED, ids=name_of)
def test_hopper_lowers_what_it_takes(op):
    """What is only checked when a kernel is lowered: shared memory, shapes of products."""
    rng = np.random.default_rng(1)
    fits = False
    while not fits:
        sizes, call, arrays = DRAW[op](rng)
        fits = sizes.items() >= LOWERED[op].items() and op.supported("hopper", **sizes) is None
    jax.jit(functools.partial(call, "hopper")).trace(*arrays).lower(lowering_platforms=("cuda",))


def test_names_the_size_to_blame():
    """V2-Lite's experts and heads over 4 tensor shards: sizes that kernels once were chosen for."""
    widths: dict[str, Any] = {"width_in": 2048, "width_out": 1408 // 4, "dtype": "bfloat16"}
    assert grouped_matmul.supported("xla", **widths) is None
    for implementation, step in (("tpu", 128), ("hopper", 64)):
        want = f"output width 352 must be a multiple of {step}"
        assert grouped_matmul.supported(implementation, **widths) == want
    pool: dict[str, Any] = {"kv_rank": 512, "rope_dim": 64, "page_size": 64, "dtype": "bfloat16"}
    want = "query rows 1 x 4 = 4 must be a multiple of 8"
    assert mla_decode.supported("hopper", num_heads=16 // 4, **pool) == want
    assert mla_decode.supported("hopper", num_heads=16, **pool) is None
    want = "query rows 5 x 128 = 640 must be at most 512"
    assert mla_decode.supported("tpu", num_heads=128, num_tokens=5, **pool) == want
    want = "rope dim 128 must be 64"
    assert mla_decode.supported("hopper", num_heads=16, **pool | {"rope_dim": 128}) == want
    want = "width 200 must be a multiple of 128"
    assert expert_permute.supported("hopper", width=200, dtype="bfloat16") == want


@pytest.mark.parametrize("op", OPS, ids=name_of)
@pytest.mark.usefixtures("unchecked_annotations")
def test_chips(op, rng):
    """Kernels are for their chips; the other implementations run on all."""
    while True:
        sizes, _, _ = DRAW[op](rng)
        names = op.IMPLEMENTATIONS
        if all(op.supported(name, **sizes) is None for name in names):
            break
    of_kernels = {"tpu": {*chips.TPU_NAMES}, "hopper": {"hopper"}}
    for name in names:
        for chip in (*chips.TPU_NAMES, "hopper", "gpu", "cpu"):
            reason = op.supported(name, **sizes, chip=chip)
            if chip in of_kernels.get(name, {chip}):
                assert reason is None
            else:
                assert reason.startswith(f"chip '{chip}' must be")
    with pytest.raises(ValueError, match="implementation: 'cuda' must be one of"):
        op.supported("cuda", **sizes)


def test_transports():
    """The exchange's transports, which divide experts among shards."""
    sizes: dict[str, Any] = {"num_experts": 12, "num_shards": 4, "max_shards": 3}
    for transport in expert_exchange.TRANSPORTS:
        assert expert_exchange.supported(transport, **sizes) is None
        assert expert_exchange.supported(transport, **sizes, chip="hopper") is None
        want = "num_experts 10 must be a multiple of 4"
        assert expert_exchange.supported(transport, **sizes | {"num_experts": 10}) == want
        on_cpu = expert_exchange.supported(transport, **sizes, chip="cpu")
        assert (on_cpu is None) == (transport == "fixed")
    with pytest.raises(ValueError, match="transport: 'pigeon' must be one of"):
        expert_exchange.supported("pigeon", **sizes)


@pytest.mark.parametrize(
    ("platform", "kind", "chip"),
    [
        ("tpu", "TPU v4", "v4"),
        ("tpu", "TPU v5 lite", "v5e"),
        ("tpu", "TPU v5", "v5p"),
        ("tpu", "TPU v5p", "v5p"),
        ("tpu", "TPU v6 lite", "v6e"),
        ("tpu", "TPU7x", "7x"),
        ("tpu", "TPU v3", "tpu"),
        ("gpu", "NVIDIA H100 80GB HBM3", "hopper"),
        ("cuda", "NVIDIA H200", "hopper"),
        ("gpu", "NVIDIA A100-SXM4-40GB", "gpu"),
        ("rocm", "AMD Instinct MI300X", "gpu"),
        ("cpu", "cpu", "cpu"),
    ],
)
def test_chip_of_a_device(platform, kind, chip):
    assert chips.chip_of(platform, kind) == chip


@pytest.mark.usefixtures("unchecked_annotations")
@pytest.mark.parametrize("draw", [draw_attention, draw_decode, draw_grouped])
def test_portable_products_of_float32_keep_all_their_bits(draw):
    """Where a GPU or TPU would round them by default: the CPU's results cannot show it."""
    rng = np.random.default_rng(0)
    while (drawn := draw(rng))[0]["dtype"] != "float32":
        pass
    _, call, arrays = drawn
    text = str(jax.make_jaxpr(functools.partial(call, "xla"))(*arrays))
    products = text.count("dot_general[")
    assert products > 0
    assert text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == products
