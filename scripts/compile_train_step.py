"""Compiles a whole training step for a TPU pod that is not here, and says what it needs.

    python scripts/compile_train_step.py configs/models/deepseek_v2.py v5p:4x4x4
        --mesh=fsdp=8,expert=8 runtime.param_dtype=bfloat16

Prints one JSON object: seconds of compiling, bytes a chip by XLA's own account, and the collectives
that the program contains, loops multiplied out. Runs on a CPU host; needs libtpu (`dsjax[tpu]`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time


def main() -> None:
    """Compiles what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("topology", help="a libtpu topology, like v5p:4x4x4")
    parser.add_argument("overrides", nargs="*", help="like num_layers=8 or runtime.remat=none")
    parser.add_argument("--mesh", default="", help="like fsdp=8,expert=8; fsdp takes the rest")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--chunk", type=int, default=4096, help="tokens of logits at a time")
    arguments = parser.parse_intermixed_args()
    print(json.dumps(compile_step(arguments)))


def compile_step(arguments: argparse.Namespace) -> dict[str, object]:
    """Returns what is printed."""
    from dsjax.config import BalanceConfig, LossConfig, MeshConfig
    from dsjax.config.load import load_model_and_runtime
    from dsjax.plan import count_collectives, lower_train_step, tpu_devices

    model, runtime = load_model_and_runtime(arguments.config, arguments.overrides)
    sizes = (entry.split("=") for entry in arguments.mesh.split(",") if entry)
    mesh = MeshConfig(**{axis: int(size) for axis, size in sizes})
    devices = tpu_devices(arguments.topology)
    # The paper's balance losses (§3.1.2).
    loss = LossConfig(BalanceConfig(0.003, 0.05, 0.02), chunk=arguments.chunk)
    began, began_cpu = time.perf_counter(), time.process_time()
    lowered = lower_train_step(model, runtime, mesh, devices, length=arguments.length, loss=loss)
    compiled = lowered.compile()
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - began_cpu
    memory = compiled.memory_analysis()
    text = compiled.as_text()
    assert memory is not None
    assert text is not None
    uses = count_collectives(text)
    return {
        "config": arguments.config,
        "topology": arguments.topology,
        "chips": len(devices),
        "mesh": arguments.mesh,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "peak_gib": round(memory.peak_memory_in_bytes / 2**30, 2),
        "argument_gib": round(memory.argument_size_in_bytes / 2**30, 2),
        "temporary_gib": round(memory.temp_size_in_bytes / 2**30, 2),
        "collectives": {name: dataclasses.asdict(use) for name, use in uses.items()},
    }


if __name__ == "__main__":
    main()
