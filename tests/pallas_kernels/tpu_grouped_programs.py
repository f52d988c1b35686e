"""Compiles the experts' kernels for TPUs that are not there; run in a process of its own.

    python -m tests.pallas_kernels.tpu_grouped_programs v5e,v5p,v6e,tpu7x

prints one JSON line per chip and program.
"""

import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tests import tpu_compiler, tpu_facts
from tests.tpu_compiler import TOPOLOGIES, run_compiler

if TYPE_CHECKING:
    from jax.typing import DTypeLike


def compile_programs(chips: tuple[str, ...]) -> list[dict]:
    """Compiles all programs for these chips."""
    return run_compiler("tests.pallas_kernels.tpu_grouped_programs", ",".join(chips))


def programs() -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Training on a shard of V2's experts and on all of V2-Lite's; decoding, also of a stack."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.grouped_matmul import (
        BlockScaledWeights,
        LayerOfStack,
        grouped_matmul,
        grouped_swiglu,
    )
    from pallas_kernels.quantised import Format, quantise

    bf16 = jnp.bfloat16

    def array(*shape: int, dtype: "DTypeLike" = bf16) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    def experts(rows: Any, weights: Any, group_sizes: Any, offset: Any) -> jax.Array:
        gate, up, down = weights
        options: dict[str, Any] = {"group_offset": offset, "implementation": "tpu"}
        hidden = grouped_swiglu(rows, gate, up, group_sizes, **options)
        return grouped_matmul(hidden, down, group_sizes, **options)

    def step(rows: Any, weights: Any, group_sizes: Any, offset: Any) -> Any:
        def loss(rows: Any, weights: Any) -> jax.Array:
            return experts(rows, weights, group_sizes, offset).astype(jnp.float32).sum()

        return jax.value_and_grad(loss, argnums=(0, 1))(rows, weights)

    def layers(rows: Any, stacks: Any, group_sizes: Any, offset: Any) -> jax.Array:
        def layer(rows: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
            weights = [LayerOfStack(stack, number) for stack in stacks]
            return rows + experts(rows, weights, group_sizes, offset), None

        return jax.lax.scan(layer, rows, jnp.arange(stacks[0].shape[0]))[0]

    def stack_decoding(
        rows: int, width: int, hidden: int, groups: int, layers: int
    ) -> tuple[Any, ...]:
        gate, down = array(layers, groups, width, hidden), array(layers, groups, hidden, width)
        sizes, offset = array(groups, dtype=jnp.int32), array(dtype=jnp.int32)
        return array(rows, width), (gate, gate, down), sizes, offset

    def stored_decoding(
        rows: int, width: int, hidden: int, groups: int, layers: int, form: Format
    ) -> tuple[Any, ...]:
        def stack(*dims: int) -> Any:
            return jax.eval_shape(lambda: quantise(jnp.zeros((layers, groups, *dims)), form))

        gate, down = stack(hidden, width), stack(width, hidden)
        sizes, offset = array(groups, dtype=jnp.int32), array(dtype=jnp.int32)
        return array(rows, width), (gate, gate, down), sizes, offset

    def training(rows: int, width: int, hidden: int, held: int, groups: int) -> tuple[Any, ...]:
        gate, down = array(held, width, hidden), array(held, hidden, width)
        sizes, offset = array(groups, dtype=jnp.int32), array(dtype=jnp.int32)
        return array(rows, width), (gate, gate, down), sizes, offset

    def decoding(
        rows: int, width: int, hidden: int, groups: int, dtype: "DTypeLike"
    ) -> tuple[Any, ...]:
        def weights(*shape: int) -> BlockScaledWeights:
            scales = array(groups, *(n // 128 for n in shape), dtype=jnp.float32)
            return BlockScaledWeights(array(groups, *shape, dtype=dtype), scales)

        gate, down = weights(width, hidden), weights(hidden, width)
        sizes, offset = array(groups, dtype=jnp.int32), array(dtype=jnp.int32)
        return array(rows, width), (gate, gate, down), sizes, offset

    return {
        "v2_training": (step, training(24576, 5120, 1536, 20, 160)),
        "v2_lite_training": (step, training(49152, 2048, 1408, 64, 64)),
        "v2_int8_decoding": (experts, decoding(768, 5120, 1536, 160, jnp.int8)),
        "v2_lite_float8_decoding": (experts, decoding(6, 2048, 1408, 64, jnp.float8_e4m3fn)),
        "v2_lite_stack_decoding": (layers, stack_decoding(96, 2048, 1408, 64, 4)),
        # Numbers with scales of columns and of groups, and of blocks with the rows of a prefill.
        "v2_lite_stored_int8_decoding": (
            layers,
            stored_decoding(96, 2048, 1408, 64, 4, Format("int8")),
        ),
        "v2_lite_stored_int4_g64_decoding": (
            layers,
            stored_decoding(768, 2048, 1408, 64, 4, Format("int4", 64)),
        ),
        "v2_stored_float8_prefill": (
            layers,
            stored_decoding(24576, 5120, 1536, 20, 2, Format("float8_e4m3fn", 128, 128, "float32")),
        ),
    }


def main(chips: str) -> None:
    """Compiles and prints."""
    import jax

    from dsjax.plan import tpu_devices

    for chip in chips.split(","):
        devices = tpu_devices(TOPOLOGIES[chip])
        sharding = jax.sharding.SingleDeviceSharding(devices[0])
        # Kernels ask the mesh in use for the chip.
        mesh = jax.sharding.Mesh(devices[:1], ("chip",)).abstract_mesh
        for name, (function, arguments) in programs().items():
            placed = jax.tree.map(
                lambda x, s=sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), arguments
            )
            with jax.sharding.use_abstract_mesh(mesh):
                lowered = jax.jit(function).trace(*placed).lower()
            found = tpu_compiler.facts(
                "grouped", f"{chip} {name}", lowered, TOPOLOGIES[chip], tpu_facts.grouped_kernels
            )
            rows, width = arguments[0].shape
            hidden = arguments[1][0].shape[-1]
            result = {
                "chip": chip,
                "program": name,
                # At most so many rows of both widths are alive at once.
                "rows_bytes": 2 * rows * (3 * width + 7 * hidden) + 2**24,
            }
            print(json.dumps(result | found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
