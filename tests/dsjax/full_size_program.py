"""Lowers the whole 236B training step for a pod of 64 chips; run as a module, in its own process.

prints one JSON line: the lines of the lowered program, and what the compiled one needs and sends.
"""

import json

from tests import tpu_compiler, tpu_facts

TOPOLOGY = "v5p:4x4x4"


def main() -> None:
    """Lowers and prints."""
    from dsjax.config import BalanceConfig, LossConfig, MeshConfig, RuntimeConfig
    from dsjax.configs.models import deepseek_v2
    from dsjax.plan import lower_train_step, tpu_devices
    from dsjax.training.step import COMPILER_OPTIONS

    devices = tpu_devices(TOPOLOGY)
    lowered = lower_train_step(
        deepseek_v2.config,
        RuntimeConfig(param_dtype="bfloat16"),
        MeshConfig(fsdp=8, expert=8),
        devices,
        length=4096,
        loss=LossConfig(BalanceConfig(0.003, 0.05, 0.02), chunk=4096),  # §3.1.2
    )
    found = tpu_compiler.facts(
        "train_step",
        f"deepseek_v2 {TOPOLOGY} fsdp=8,expert=8",
        lowered,
        TOPOLOGY,
        tpu_facts.collectives_and_memory,
        COMPILER_OPTIONS["tpu"],
    )
    lines = lowered.as_text().count("\n")
    print(json.dumps(found | {"chips": len(devices), "lines": lines}))


if __name__ == "__main__":
    main()
