"""The exchange between shards, by every transport, against what it means.

On CPU devices, whose backend lacks the ragged exchange, an emulation of what jax documents stands
for it; on two or more GPUs (`DSJAX_TEST_PLATFORM=gpu`) it is the real one.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels.expert_exchange import (
    TRANSPORTS,
    exchange_rows,
    plan_exchange,
    return_tokens,
    send_choices,
    send_tokens,
)
from pallas_kernels.expert_exchange.cases import CASES

SHARDS = min(4, jax.device_count())
CASE = CASES[0]  # All have its sizes.
EXPERTS, TOKENS, TOP_K, WIDTH = CASE.num_experts, CASE.tokens, CASE.top_k, CASE.width
MAX_SHARDS = min(CASE.max_shards, SHARDS)
PIECES = 3 * SHARDS  # Few, as each is a step of the emulation.

needs_devices = pytest.mark.skipif(SHARDS < 2, reason="needs two devices")


def emulate_ragged_all_to_all(
    operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name
):
    """What jax.lax.ragged_all_to_all is documented to do, for a backend that does not have it."""
    me = jax.lax.axis_index(axis_name)
    operands = jax.lax.all_gather(operand, axis_name)
    # [source, piece] of what comes here
    starts, places, sizes = (
        jax.lax.all_gather(array.reshape(SHARDS, -1), axis_name)[:, me]
        for array in (input_offsets, output_offsets, send_sizes)
    )
    row = jnp.arange(output.shape[0])
    for source, piece in np.ndindex(sizes.shape):
        index = row - places[source, piece]
        hit = (index >= 0) & (index < sizes[source, piece])
        values = operands[source].at[starts[source, piece] + index].get(mode="fill", fill_value=0)
        output = jnp.where(jnp.expand_dims(hit, range(1, output.ndim)), values, output)
    # Sizes that do not agree would hang or corrupt a real exchange.
    agree = jnp.all(sizes.reshape(-1) == recv_sizes)
    return jnp.where(agree, output, jnp.full_like(output, -77))


@pytest.fixture(params=TRANSPORTS)
def transport(request, monkeypatch):
    if request.param != "fixed" and jax.default_backend() == "cpu":
        monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulate_ragged_all_to_all)
    return request.param


def on_shards(function):
    mesh = jax.make_mesh((SHARDS,), ("expert",), (AxisType.Auto,), devices=jax.devices()[:SHARDS])
    return jax.jit(
        jax.shard_map(
            function, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"), check_vma=False
        )
    )


def exchange_of(transport):
    """One function of the whole exchange and its gradients, with experts that only scale."""

    def run(x_ND, gates_NK, indices_NK, scale_E, probe_ND):
        plan = plan_exchange(
            indices_NK,
            num_experts=EXPERTS,
            max_shards=MAX_SHARDS,
            axis_name="expert",
            transport=transport,
            pieces=PIECES,
        )

        def forward(x_ND, gates_NK):
            rows_RD = send_tokens(x_ND, plan)
            experts_RK, gates_RK = send_choices(indices_NK, gates_NK, plan)
            scale_RK = scale_E.at[experts_RK].get(mode="fill", fill_value=0)
            out_RD = rows_RD * jnp.sum(gates_RK * scale_RK, axis=1, keepdims=True)
            return return_tokens(out_RD, plan), (rows_RD, experts_RK, gates_RK)

        out_ND, pull, received = jax.vjp(forward, x_ND, gates_NK, has_aux=True)
        return out_ND, *pull(probe_ND), *received, plan.num_received[None]

    return on_shards(run)


@needs_devices
@pytest.mark.core
def test_exchange(transport, rng):
    run = exchange_of(transport)
    per_shard, tokens = EXPERTS // SHARDS, SHARDS * TOKENS
    for case in CASES:
        indices = case.draw(rng, SHARDS)
        x, probe = rng.standard_normal((2, tokens, WIDTH)).astype(np.float32)
        gates = rng.random((tokens, TOP_K)).astype(np.float32)
        scale = rng.standard_normal(EXPERTS).astype(np.float32)
        out, d_x, d_gates, rows, experts, received_gates, counts = map(
            np.asarray, run(x, gates, indices, scale, probe)
        )

        scale_of = np.where(indices < EXPERTS, np.append(scale, 0)[indices], 0)
        factor = np.sum(gates * scale_of, axis=1, keepdims=True)
        np.testing.assert_allclose(out, x * factor, rtol=2e-6, atol=1e-6, err_msg=case.name)
        np.testing.assert_allclose(d_x, probe * factor, rtol=2e-6, atol=1e-6, err_msg=case.name)
        want = np.sum(x * probe, axis=1, keepdims=True) * scale_of
        np.testing.assert_allclose(d_gates, want, rtol=2e-6, atol=2e-6, err_msg=case.name)

        # Each token once to every shard with an expert of it, in the order of shard and token.
        rows, experts, received_gates = (
            a.reshape(SHARDS, tokens, -1) for a in (rows, experts, received_gates)
        )
        for shard in range(SHARDS):
            here = indices // per_shard == shard
            sent = np.flatnonzero(here.any(axis=1))
            assert counts[shard] == len(sent)
            np.testing.assert_array_equal(rows[shard, : len(sent)], x[sent])
            local = np.where(here, indices - shard * per_shard, per_shard)
            np.testing.assert_array_equal(experts[shard, : len(sent)], local[sent])
            want = np.where(here, gates, 0)[sent]
            np.testing.assert_array_equal(received_gates[shard, : len(sent)], want)
            assert not rows[shard, len(sent) :].any()
            assert (experts[shard, len(sent) :] == per_shard).all()


@needs_devices
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int32])
def test_exchanged_rows_keep_their_type_and_come_back(transport, dtype, rng):
    sizes = rng.integers(0, TOKENS + 1, (SHARDS, SHARDS)).astype(np.int32)
    sizes[1] = 0
    rows = rng.integers(-9, 9, (SHARDS, SHARDS * TOKENS, 2))

    def there_and_back(rows_S):
        move = functools.partial(
            exchange_rows,
            num_rows=SHARDS * TOKENS,
            max_size=TOKENS,
            axis_name="expert",
            transport=transport,
            pieces=PIECES,
        )
        received_R = move(rows_S, jnp.asarray(sizes))
        return received_R, move(received_R, jnp.asarray(sizes.T))

    there, back = on_shards(there_and_back)(jnp.asarray(rows.reshape(-1, 2), dtype))
    assert there.dtype == back.dtype == dtype
    back = np.asarray(back).astype(int).reshape(rows.shape)
    for shard, sent in enumerate(sizes.sum(axis=1)):
        np.testing.assert_array_equal(back[shard, :sent], rows[shard, :sent])
        assert not back[shard, sent:].any()


def plan_with(**changes):
    arguments: dict[str, Any] = {
        "num_experts": EXPERTS,
        "max_shards": MAX_SHARDS,
        "axis_name": "expert",
        "transport": "fixed",
    } | changes

    def run(indices_NK):
        return plan_exchange(indices_NK, **arguments).token_S

    return on_shards(run)(np.zeros((SHARDS * TOKENS, TOP_K), np.int32))


@pytest.mark.skipif(SHARDS != 4, reason="its messages count four devices")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transport": "pigeon"}, "transport: 'pigeon' must be one of"),
        ({"num_experts": 10}, "num_experts 10 must be a multiple of 4"),
        ({"max_shards": 5}, "max_shards 5 must be at most 4"),
        ({"max_shards": 0}, "max_shards 0 must be at least 1"),
    ],
)
def test_errors_name_the_argument(changes, message):
    with pytest.raises(ValueError, match=message):
        plan_with(**changes)
