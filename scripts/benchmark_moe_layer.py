"""Times a whole MoE layer, forward and backward, beside its matrix products at the dense rate.

    python scripts/benchmark_moe_layer.py [CONFIG] [--tokens 32768] [--implementation hopper]
        [--profile]

The layer is dsjax.layers.moe.MoE on one device: route, permute, experts, combine, without and with
the shared experts. It is set against its routed (and shared) matrix products as dense ones of the
same number of rows, timed in turns with it. Its memory is the compiled program's, printed beside
the bytes of its rows times their widths. --profile lists the time of each kernel in a trace.
"""

import collections
import dataclasses
import functools
import gzip
import json
import pathlib
import re
import tempfile
from collections.abc import Callable, Hashable

import jax
import jax.numpy as jnp
from arguments import IMPLEMENTATIONS, command_line, one_line_errors, positive
from benchmark_grouped_matmul import draw, take_turns
from flax import nnx

from dsjax.config import ModelConfig, MoEConfig, RuntimeConfig
from dsjax.config.load import load_model_config
from dsjax.kernels import Kernels
from dsjax.layers.moe import MoE
from dsjax.layers.options import LayerOptions
from dsjax.mesh import train_rules

PROFILED_CALLS = 3

Parameters = nnx.State[Hashable, nnx.Variable[jax.Array]]


def layer_step(
    config: ModelConfig, moe: MoEConfig, implementation: str
) -> tuple[jax.stages.Wrapped, Parameters]:
    """Returns a jitted forward and backward pass of one layer, and its parameters."""
    router = "bfloat16_terms" if implementation == "hopper" else "float32"
    permute = "hopper" if implementation == "hopper" else "xla"
    kernels = Kernels(grouped_matmul=implementation, expert_permute=permute, router=router)
    options = LayerOptions.of(
        config, RuntimeConfig(param_dtype="bfloat16"), train_rules(None), kernels
    )

    @jax.jit
    def parameters() -> Parameters:
        return nnx.state(MoE(moe, config.hidden_dim, options, nnx.Rngs(0)))

    abstract = nnx.eval_shape(lambda: MoE(moe, config.hidden_dim, options, nnx.Rngs(0)))
    graphdef = nnx.graphdef(abstract)

    @jax.jit
    def step(state: Parameters, x_BTD: jax.Array, d_out_BTD: jax.Array) -> object:
        def forward(state: Parameters, x_BTD: jax.Array) -> jax.Array:
            return nnx.merge(graphdef, state)(x_BTD, None, None)[0]

        out_BTD, pull = jax.vjp(forward, state, x_BTD)
        return out_BTD, pull(d_out_BTD)

    return step, parameters()


def dense_calls(rows: int, hidden: int, intermediate: int) -> dict[str, Callable[[], object]]:
    """Returns gate with up, and down, as dense products."""
    wide, narrow = (hidden, 2 * intermediate), (intermediate, hidden)
    return {
        f"dense {rows} x {into} x {out}": functools.partial(
            jax.jit(jnp.matmul), draw(3, rows, into), draw(4, into, out, scale=into**-0.5)
        )
        for into, out in (wide, narrow)
    }


def show_kernels(compiled: jax.stages.Compiled, *arrays: object) -> None:
    """Prints the kernels of one call, the longest first, with the operation each is part of."""
    named = re.findall(r'%?(\S+) = .*op_name="([^"]*)"', compiled.as_text() or "")
    operations = {re.sub(r"[.-]", "_", name): path for name, path in named}
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=False):
            for _ in range(PROFILED_CALLS):
                jax.block_until_ready(compiled(*arrays))
        (path,) = pathlib.Path(folder).glob("**/*.trace.json.gz")
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    devices, streams = set(), set()
    for event in events:
        if event.get("name") == "process_name" and "GPU" in event["args"]["name"]:
            devices.add(event["pid"])
        if event.get("name") == "thread_name" and "Stream" in event["args"]["name"]:
            streams.add((event["pid"], event["tid"]))
    total: dict[str, list[float]] = collections.defaultdict(list)
    for event in events:
        where = event.get("pid"), event.get("tid")
        if event.get("ph") == "X" and where[0] in devices and where in streams:
            total[event["name"]].append(event["dur"] / PROFILED_CALLS)
    print(f"  kernels: {sum(map(sum, total.values())):.1f} us")
    for name, each in sorted(total.items(), key=lambda item: -sum(item[1])):
        operation = operations.get(name, "").removeprefix("jit(step)/")
        count = len(each) // PROFILED_CALLS
        print(f"  {sum(each):9.1f} us {count:3d} x  {name[:40]}  {operation[-90:]}")


def show_memory(compiled: jax.stages.Compiled, wide: int) -> None:
    """Prints the program's bytes beside those of rows as wide as hidden and intermediate."""
    memory = compiled.memory_analysis()
    assert memory is not None
    sizes = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
    }
    listed = ", ".join(f"{name} {size / 1e9:.3f}" for name, size in sizes.items())
    print(f"  GB: {listed}; rows x (hidden + intermediate) in bfloat16 {wide / 1e9:.3f}")
    print(f"  temporary / rows x (hidden + intermediate): {sizes['temporary'] / wide:.2f}")


def measure(
    config: ModelConfig, num_tokens: int, implementation: str, shared: bool, profile: bool
) -> None:
    """Prints the layer's time, the dense products' share of it, and its memory."""
    moe = config.moe
    assert moe is not None
    if not shared:
        moe = dataclasses.replace(moe, num_shared_experts=0)
        config = dataclasses.replace(config, moe=moe)
    step, state = layer_step(config, moe, implementation)
    x_BTD, d_out_BTD = (
        draw(0, 1, num_tokens, config.hidden_dim),
        draw(1, 1, num_tokens, config.hidden_dim),
    )
    arrays = (state, x_BTD, d_out_BTD)
    rows = num_tokens * moe.top_k
    dense = dense_calls(rows, config.hidden_dim, moe.intermediate_dim)
    if shared:
        dense |= dense_calls(num_tokens, config.hidden_dim, moe.shared_intermediate_dim)
    compiled = step.lower(*arrays).compile()
    calls = {"layer": functools.partial(compiled, *arrays)} | dense
    seconds = take_turns(calls, jax.block_until_ready)
    # A product has two more of its size in the backward pass: the rows' and the weights'.
    ideal = 3 * sum(seconds[name] for name in dense)
    layer = seconds["layer"]
    name = "with" if shared else "without"
    print(f"\n{num_tokens} tokens, forward + backward, {name} shared experts")
    print(f"  layer {layer * 1e3:.3f} ms, its products dense {ideal * 1e3:.3f} ms")
    print(f"  share {ideal / layer:.3f}, overhead {layer / ideal - 1:.3f}")
    for name in dense:
        print(f"  {name}: {seconds[name] * 1e3:.3f} ms")
    show_memory(compiled, rows * 2 * (config.hidden_dim + moe.intermediate_dim))
    if profile:
        show_kernels(compiled, *arrays)


def main() -> None:
    """Measures the layer of the config on the command line."""
    parser = command_line(__doc__)
    parser.add_argument("config", nargs="?", default="configs/models/deepseek_v2_lite.py")
    parser.add_argument("--tokens", type=positive, default=32768)
    parser.add_argument("--implementation", default="hopper", choices=IMPLEMENTATIONS)
    parser.add_argument("--profile", action="store_true", help="list the kernels' times")
    options = parser.parse_args()
    config = load_model_config(options.config)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    for shared in (False, True):
        measure(config, options.tokens, options.implementation, shared, options.profile)


if __name__ == "__main__":
    with one_line_errors():
        main()
