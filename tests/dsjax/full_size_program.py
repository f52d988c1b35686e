"""Lowers a run's whole training step for its pod; run as a module, in its own process.

    python -m tests.dsjax.full_size_program v2_v5p_64 v5p:4x4x4

prints one JSON line: the lines of the lowered program, and what the compiled one needs and sends.
"""

import json
import sys

from tests import tpu_compiler, tpu_facts


def main(name: str, topology: str) -> None:
    """Lowers and prints."""
    from dsjax.config.load import load_train_config
    from dsjax.plan import tpu_devices
    from dsjax.plan.lower import lower_run
    from dsjax.xla_options import compiler_options

    devices = tpu_devices(topology)
    lowered = lower_run(load_train_config(name), devices)
    found = tpu_compiler.facts(
        "train_step",
        f"{name} {topology}",
        lowered,
        topology,
        tpu_facts.collectives_and_memory,
        compiler_options("tpu"),
    )
    lines = lowered.as_text().count("\n")
    print(json.dumps(found | {"chips": len(devices), "lines": lines}))


if __name__ == "__main__":
    main(*sys.argv[1:])
