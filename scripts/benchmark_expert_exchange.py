"""Times the exchange between the devices of an expert axis beside a plain all-to-all.

    python scripts/benchmark_expert_exchange.py [bytes] [exchange] [layer] [--tokens 16384]

`exchange` times the rows that device-limited routing sends (V2's 160 experts in 8 groups, random
affinities) by every transport, and `jax.lax.all_to_all` of as many bytes in the same run. GB/s
count the bytes that leave one device. "dispatch" is what a layer does before its experts: it
gathers the rows by device and sends them, with the choices beside them. "combine" is what it does
after its experts: it sends the rows back and sums them. `bytes` prints what a device of a pod
sends, on paper. `layer` compares a layer on all devices with one on one device, forward and
backward: values and time.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Hashable
from typing import TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from arguments import command_line, one_line_errors, positive
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from dsjax.config import MeshConfig, ModelConfig, RuntimeConfig
from dsjax.config.load import load_model_config
from dsjax.configs.models import deepseek_v2
from dsjax.kernels import choose_kernels
from dsjax.layers.moe import MoE
from dsjax.layers.moe.dispatch import max_shards
from dsjax.layers.moe.router import choose_experts
from dsjax.layers.options import LayerOptions
from dsjax.mesh import ShardingRules, make_mesh, train_rules
from pallas_kernels.expert_exchange import (
    TRANSPORTS,
    exchange_rows,
    plan_exchange,
    return_tokens,
    send_choices,
    send_tokens,
)
from pallas_kernels.expert_exchange.cases import POD_SHARDS, TIMED_TOKENS, TIMED_WIDTH
from pallas_kernels.expert_exchange.plan import ExchangePlan

REPEATS, ROUNDS = 20, 5

Parameters = nnx.State[Hashable, nnx.Variable[jax.Array]]


class Changes(TypedDict, total=False):
    """The kernels that a run names; the others are those chosen for the device."""

    expert_exchange: str
    exchange_chunks: int
    grouped_matmul: str


def seconds_of(call: Callable[..., object], *arguments: object, repeats: int = 1) -> float:
    """Returns the median seconds of one repeat."""
    jax.block_until_ready(call(*arguments))
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        jax.block_until_ready(call(*arguments))
        times.append((time.perf_counter() - start) / repeats)
    return float(np.median(times))


def on_devices(
    function: Callable[..., jax.Array], num_arguments: int
) -> tuple[jax.sharding.Mesh, Callable[..., jax.Array]]:
    """Runs a function REPEATS times in one program, its result the next one's first argument."""
    mesh = jax.make_mesh((jax.device_count(),), ("expert",), (AxisType.Auto,))

    def repeated(first: jax.Array, *rest: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, REPEATS, lambda _, x: function(x, *rest), first)

    spec = P("expert")
    return mesh, jax.jit(
        jax.shard_map(
            repeated, mesh=mesh, in_specs=(spec,) * num_arguments, out_specs=spec, check_vma=False
        )
    )


def exchange(tokens: int, width: int, transports: list[str]) -> None:
    """Prints the rates of every transport and of a plain all-to-all."""
    moe, shards = deepseek_v2.config.moe, jax.device_count()
    assert moe is not None
    fan_out = max_shards(moe, shards)
    keys = jax.random.split(jax.random.key(0), 3)
    scores = jax.nn.softmax(2 * jax.random.normal(keys[0], (shards * tokens, moe.num_experts)))
    gates, indices = choose_experts(scores, moe)
    x = jax.random.normal(keys[1], (shards * tokens, width), jnp.bfloat16)
    target = np.asarray(indices) // (moe.num_experts // shards)
    goes = (target[..., None] == np.arange(shards)).any(axis=1).reshape(shards, tokens, shards)
    sizes = goes.sum(axis=1)
    leaving = (sizes.sum() - np.trace(sizes)) / shards * width * 2
    print(
        f"\n{shards} devices x {tokens} tokens x {width} bfloat16, at most {fan_out} devices a "
        f"token: {sizes.sum() / shards / tokens:.3f} rows a token sent, "
        f"{leaving / 1e6:.1f} MB leave a device",
        flush=True,
    )

    def report(name: str, seconds: float, peer: float | None = None) -> float:
        ratio = "" if peer is None else f"  {peer / seconds:5.2f} x all_to_all"
        print(f"  {name:24s} {seconds * 1e6:9.1f} us {leaving / seconds / 1e9:7.1f} GB/s{ratio}")
        return seconds

    # Blocks as large as the mean of those that leave, so that the plain one moves as many bytes.
    block = round((sizes.sum() - np.trace(sizes)) / shards / max(1, shards - 1))
    mesh, plain = on_devices(
        lambda x: jax.lax.all_to_all(x, "expert", split_axis=0, concat_axis=0, tiled=True), 1
    )
    spread = jax.NamedSharding(mesh, P("expert"))
    blocks = jax.device_put(
        jax.random.normal(keys[2], (shards * shards * block, width), jnp.bfloat16), spread
    )
    peer = report("all_to_all", seconds_of(plain, blocks, repeats=REPEATS))
    x, indices, gates = (jax.device_put(a, spread) for a in (x, indices, gates))
    rows = jax.device_put(
        jax.random.normal(keys[2], (shards * shards * tokens, width), jnp.bfloat16), spread
    )
    for transport in transports:

        def move(rows_RD: jax.Array, transport: str = transport) -> jax.Array:
            return exchange_rows(
                rows_RD,
                jnp.asarray(sizes, jnp.int32),
                num_rows=shards * tokens,
                max_size=tokens,
                axis_name="expert",
                transport=transport,
            )

        def plan_of(indices_NK: jax.Array, transport: str = transport) -> ExchangePlan:
            return plan_exchange(
                indices_NK,
                num_experts=moe.num_experts,
                max_shards=fan_out,
                axis_name="expert",
                transport=transport,
            )

        def dispatch(
            x_ND: jax.Array,
            indices_NK: jax.Array,
            gates_NK: jax.Array,
            plan_of: Callable[[jax.Array], ExchangePlan] = plan_of,
        ) -> jax.Array:
            plan = plan_of(indices_NK)
            rows_RD = send_tokens(x_ND, plan)
            _, gates_RK = send_choices(indices_NK, gates_NK, plan)
            # Keeps the exchange of the choices alive.
            return rows_RD[: x_ND.shape[0]] + gates_RK[0, 0].astype(x_ND.dtype) * 0

        def there_and_back(
            x_ND: jax.Array,
            indices_NK: jax.Array,
            gates_NK: jax.Array,
            plan_of: Callable[[jax.Array], ExchangePlan] = plan_of,
        ) -> jax.Array:
            plan = plan_of(indices_NK)
            rows_RD = send_tokens(x_ND, plan)
            _, gates_RK = send_choices(indices_NK, gates_NK, plan)
            return return_tokens(rows_RD, plan) + gates_RK[0, 0].astype(x_ND.dtype) * 0

        try:
            _, moved = on_devices(move, 1)
            report(f"{transport} rows", seconds_of(moved, rows, repeats=REPEATS), peer)
            _, sent = on_devices(dispatch, 3)
            there = seconds_of(sent, x, indices, gates, repeats=REPEATS)
            report(f"{transport} dispatch", there, peer)
            _, both = on_devices(there_and_back, 3)
            total = seconds_of(both, x, indices, gates, repeats=REPEATS)
            report(f"{transport} combine", total - there, peer)
        except jax.errors.JaxRuntimeError as error:
            print(f"  {transport}: {str(error)[:300]}")


def exchange_bytes(config: ModelConfig, shards: int, tokens: int) -> None:
    """Prints the bytes a device sends one way in a layer: bound, random routing, alternatives."""
    moe, row = config.moe, 2 * config.hidden_dim
    assert moe is not None
    fan_out = max_shards(moe, shards)
    scores = jax.nn.softmax(2 * jax.random.normal(jax.random.key(0), (4096, moe.num_experts)))
    target = np.asarray(choose_experts(scores, moe)[1]) // (moe.num_experts // shards)
    goes = (target[..., None] == np.arange(shards)).any(axis=1).sum(axis=1)
    assert goes.max() <= fan_out
    megabytes = {
        "bound": fan_out * row,
        "routed": goes.mean() * row,
        "leaving": goes.mean() * row * (shards - 1) / shards,
        "choices": fan_out * 2 * moe.top_k * 4,
        "once an expert": moe.top_k * row,
        "gathering all": (shards - 1) * row,
    }
    text = "  ".join(f"{name} {each * tokens / 1e6:.1f}" for name, each in megabytes.items())
    print(f"expert={shards}, {tokens} tokens a device, MB: {text}")


def layer(
    config: ModelConfig,
    runtime: RuntimeConfig,
    tokens: int,
    timed: bool,
    **changes: Unpack[Changes],
) -> None:
    """Prints how far the results of all devices are from those of one, and the time of both."""
    moe, dtype = config.moe, runtime.dtype
    assert moe is not None
    count, width = jax.device_count(), config.hidden_dim
    kernels = dataclasses.replace(choose_kernels(jax.devices()[0], config, runtime), **changes)
    x = jax.random.normal(jax.random.key(1), (count, tokens, width), jnp.dtype(dtype))
    probe = jax.random.normal(jax.random.key(2), x.shape, jnp.dtype(dtype))

    @functools.partial(jax.jit, static_argnums=0)
    def step(
        graph: nnx.GraphDef[MoE], state: Parameters, x_BTD: jax.Array, probe_BTD: jax.Array
    ) -> tuple[jax.Array, Parameters, jax.Array]:
        def loss(state: Parameters, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
            out_BTD, _ = nnx.merge(graph, state)(x_BTD, None, None)
            return jnp.sum(out_BTD.astype(jnp.float32) * probe_BTD), out_BTD

        gradients, out_BTD = jax.grad(loss, argnums=(0, 1), has_aux=True)(state, x_BTD)
        return out_BTD, *gradients

    def run(rules: ShardingRules) -> tuple[list[np.ndarray], float]:
        options = LayerOptions.of(config, runtime, rules, kernels)
        create = functools.partial(MoE, moe, width, options)
        graph, state = nnx.split(nnx.eval_shape(lambda: create(nnx.Rngs(0))))

        def values() -> Parameters:
            state = nnx.state(create(nnx.Rngs(0)))
            return jax.tree.map(lambda w: w.astype(dtype), state)

        shardings = None
        where = rules.sharding("batch", "length", "embed") or jax.devices()[0]
        if rules.mesh is not None:
            shardings = jax.tree.map(
                lambda w: w.replace(rules.sharding(*w.get_metadata("dims"))),
                state,
                is_leaf=lambda node: isinstance(node, nnx.Variable),
            )
        state = jax.jit(values, out_shardings=shardings)()
        inputs = jax.device_put((x, probe), where)
        out = step(graph, state, *inputs)
        seconds = seconds_of(step, graph, state, *inputs) if timed else 0.0
        return [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(out)], seconds

    rules = train_rules(make_mesh(MeshConfig(fsdp=1, expert=count)))
    many, many_seconds = run(rules)
    one, one_seconds = run(ShardingRules())
    errors = [
        float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(many, one, strict=True)
    ]
    text = f"layer {dtype} {changes} {count} x {tokens} tokens: relative differences "
    text += " ".join(f"{error:.1e}" for error in errors)
    if timed:
        text += f"; {many_seconds * 1e3:.2f} ms, all tokens on one device {one_seconds * 1e3:.2f}"
    print(text, flush=True)


PARTS = ("bytes", "exchange", "layer")


def main() -> None:
    """Reads the command line and runs."""
    parser = command_line(__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--tokens", type=positive, default=TIMED_TOKENS)
    parser.add_argument("--width", type=positive, default=TIMED_WIDTH)
    parser.add_argument("--transports", nargs="*", choices=TRANSPORTS, default=list(TRANSPORTS))
    parser.add_argument("--model", default="deepseek_v2_lite")
    parser.add_argument("--override", nargs="*", default=[], help="such as moe.num_experts=16")
    parser.add_argument("--layer-tokens", type=positive, default=8192)
    arguments = parser.parse_args()
    for part in arguments.parts:  # argparse holds no choices against a default of several
        if part not in PARTS:
            parser.error(f"{part!r}: must be one of {', '.join(PARTS)}")
    parts = arguments.parts or ["exchange", "layer"]
    if "bytes" in parts:
        for shards in POD_SHARDS:
            exchange_bytes(deepseek_v2.config, shards, arguments.tokens)
    if "exchange" in parts:
        exchange(arguments.tokens, arguments.width, arguments.transports)
    if "layer" in parts:
        tokens = arguments.layer_tokens
        config = load_model_config(arguments.model, arguments.override)
        exact = RuntimeConfig(dtype="float32")
        for transport in arguments.transports:
            with jax.default_matmul_precision("highest"):
                changes = Changes(expert_exchange=transport, grouped_matmul="xla")
                layer(config, exact, min(tokens, 1024), False, **changes)
        for transport in arguments.transports:
            for chunks in (1, 2):
                changes = Changes(expert_exchange=transport, exchange_chunks=chunks)
                layer(config, RuntimeConfig(), tokens, True, **changes)


if __name__ == "__main__":
    with one_line_errors():
        main()
