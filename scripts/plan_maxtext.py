"""Compiles MaxText's own training step for a pod and reads it as `dsjax plan` reads ours.

    python scripts/plan_maxtext.py v2_lite    # or v2, v3; minutes each

It runs in an environment of MaxText's, with this tree on PYTHONPATH:

    pip install 'maxtext[tpu]==0.2.5' jax==0.11.2 jaxlib==0.11.2 libtpu==0.0.48.1

What it finds is kept in docs/maxtext.json. The speed of two of these settings on real chips is
published: measured over modelled seconds say how far steps are from what a plan models.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import json
import math
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from arguments import command_line, names_of, one_line_errors

from dsjax.plan.expected import AS_WRITTEN
from dsjax.plan.figures import Target, program_figures
from dsjax.plan.pods import Pod
from dsjax.plan.program import arrays_of
from dsjax.plan.topology import tpu_devices

KEPT = Path(__file__).resolve().parent.parent / "docs" / "maxtext.json"
FIGURES = (
    *("topology", "chips", "mesh", "peak_bytes", "capacity_bytes", "flops", "recomputed_flops"),
    *("hbm_bytes", "collective_bytes", "modelled_seconds_serial", "modelled_seconds"),
)


class Setting(NamedTuple):
    """One run of MaxText's.

    Attributes:
        topology: libtpu's name of the slice.
        arguments: MaxText's, with its name of the slice.
        measured_seconds: of a step on real chips, None where nothing is published.
        source: of the figure.
        libtpu: what LIBTPU_INIT_ARGS gets.
    """

    topology: str
    arguments: tuple[str, ...]
    measured_seconds: float | None
    source: str
    libtpu: tuple[str, ...] = ()


SETTINGS = {
    "v2_lite": Setting(
        "v5p:2x2x1",
        (
            *("model_name=deepseek2-16b", "compile_topology=v5p-8", "per_device_batch_size=24"),
            "max_target_length=2048",
        ),
        24 * 2048 / 8673,
        "MaxText's page of performance: V2-Lite on v5p-8, 8,673 tokens/s a chip",
    ),
    "v2": Setting(
        "v5p:4x4x4",
        (
            *("model_name=deepseek2-236b", "compile_topology=v5p-128", "per_device_batch_size=1"),
            *("max_target_length=4096", "ici_fsdp_parallelism=8", "ici_expert_parallelism=8"),
            *("allow_split_physical_axes=true", "weight_dtype=bfloat16", "mu_dtype=float32"),
        ),
        None,
        "nothing is published",
    ),
    "v3": Setting(
        "v5p:8x8x8",
        (
            *("model_name=deepseek3-671b", "compile_topology=v5p-1024", "per_device_batch_size=6"),
            *("max_target_length=8192", "weight_dtype=float32", "use_custom_sort_vjp=true"),
            *("sa_block_q=2048", "sa_block_kv=2048", "sa_block_kv_compute=2048"),
            *("sa_block_q_dkv=2048", "sa_block_kv_dkv=2048", "sa_block_kv_dkv_compute=2048"),
            *("sa_block_q_dq=2048", "sa_block_kv_dq=2048", "sa_use_fused_bwd_kernel=false"),
            *("remat_policy=custom", "decoder_layer_input=offload", "out_proj=offload"),
        ),
        90.668,
        "tpu-recipes, training/v5p/DeepSeek3-671B-MaxText: 90.668 s a step, 542 tokens/s a chip",
        (
            "--xla_tpu_scoped_vmem_limit_kib=81920",
            "--xla_tpu_enable_scheduler_memory_pressure_tracking=true",
            "--xla_tpu_host_transfer_overlap_limit=24",
            "--xla_tpu_aggressive_opt_barrier_removal=ENABLED",
            "--xla_tpu_enable_data_parallel_all_reduce_opt=true",
            "--xla_tpu_data_parallel_opt_different_sized_ops=true",
        ),
    ),
}


class _Compiled(Exception):
    """MaxText has compiled its step; ends its program there."""

    def __init__(self, program: Any, mesh: Any) -> None:
        super().__init__()
        self.program, self.mesh = program, mesh


def compile_step(setting: Setting) -> tuple[Any, Any]:
    """Returns MaxText's compiled step and its mesh.

    Raises:
        ImportError: MaxText is not here; says how to have it.
    """
    os.environ["LIBTPU_INIT_ARGS"] = " ".join(setting.libtpu)
    tpu_devices(setting.topology)  # has libtpu compile and not look for a TPU
    try:
        train_compile: Any = importlib.import_module("maxtext.trainers.pre_train.train_compile")
        base = Path(str(importlib.import_module("maxtext").__file__)).parent / "configs/base.yml"
    except ImportError as error:
        raise ImportError(f"{error.name} is missing; see the start of {__file__}") from None
    compile_as_it_does = train_compile.jit_and_compile

    def compile_and_leave(*arguments: Any) -> None:
        raise _Compiled(compile_as_it_does(*arguments), arguments[3])

    train_compile.jit_and_compile = compile_and_leave
    with tempfile.TemporaryDirectory() as folder:
        usual = (
            *("compile_topology_num_slices=1", "dataset_type=synthetic"),
            *("enable_checkpointing=false", f"base_output_directory={folder}"),
        )
        try:
            train_compile.main(["", str(base), *setting.arguments, *usual])
        except _Compiled as found:
            return found.program, found.mesh
    raise RuntimeError("MaxText compiled nothing")


class Annotated(NamedTuple):
    """A compiled program whose kernels say what they compute."""

    program: Any

    def memory_analysis(self) -> Any:
        """As the program's."""
        return self.program.memory_analysis()

    def as_text(self) -> str:
        """The program's, with an estimate for each of MaxText's kernels, which carry none."""
        lines = self.program.as_text().splitlines()
        return "\n".join(line + estimate(line) for line in lines)


def estimate(line: str) -> str:
    """Returns what a kernel's line lacks: its FLOPs and bytes, from its operands' shapes.

    A grouped product has rows and one or several matrices, or rows twice. Attention is causal: half
    of all pairs, of queries and keys 192 wide and values 128 wide.
    """
    if 'custom_call_target="tpu_custom_call"' not in line or "cost_estimate" in line:
        return ""
    head, _, rest = line.partition("operand_layout_constraints={")
    name, _, result = head.partition(" custom-call(")[0].partition(" = ")
    operands = arrays_of(rest.partition("}, frontend_attributes")[0])
    moved = sum(array.num_bytes for array in (*operands, *arrays_of(result)))
    kernel = _ATTENTION.search(name)
    if kernel is not None:
        queries, _, values = [array.shape for array in operands if len(array.shape) == 4][:3]
        batch, heads, length, width = queries
        scores, others = _PRODUCTS[kernel[1]]
        pairs = batch * heads * length * length / 2
        flops = 2 * pairs * (scores * width + others * values[-1])
    elif _GROUPED.search(name) is None:
        raise ValueError(f"{name.strip()}: no kernel of MaxText's that is known")
    else:
        rows, matrices = (array.shape for array in operands[-2:])
        flops = 2 * math.prod(rows) * matrices[-1]
        if len(matrices) == 3 and matrices[1] != rows[1]:  # transposed
            flops = 2 * math.prod(rows) * matrices[1]
    return f' cost_estimate":{{"flops":"{int(flops)}","bytes_accessed":"{moved}"'


# XLA names most of them after the shard_map that they are in.
_GROUPED = re.compile(r"%(t?gmm|shard_map)\b")
_ATTENTION = re.compile(r"splash_mha_(fwd|dq|dkv)_")
# Products with every pair, as wide as keys and as values: of scores, their gradients, and outputs.
_PRODUCTS = {"fwd": (1, 1), "dq": (2, 1), "dkv": (2, 2)}


def plan(setting: Setting) -> dict[str, Any]:
    """Returns the figures of a setting."""
    began = time.perf_counter()
    program, mesh = compile_step(setting)
    return read(setting, program, mesh) | {"compile_seconds": time.perf_counter() - began}


def read(setting: Setting, program: Any, mesh: Any) -> dict[str, Any]:
    """Returns the figures of a compiled step."""
    pod = dataclasses.replace(Pod.of(mesh.devices.flat), devices=tuple(mesh.devices.flat))
    target = Target(setting.topology, 1, pod, dict(mesh.shape))
    figures = program_figures(target, Annotated(program), AS_WRITTEN)
    kept = {name: figures[name] for name in FIGURES}
    kept["mesh"] = {axis: size for axis, size in kept["mesh"].items() if size > 1}
    return {
        "arguments": setting.arguments,
        "versions": {name: importlib.metadata.version(name) for name in ("maxtext", "libtpu")},
        **kept,
        "measured_seconds": setting.measured_seconds,
        "source": setting.source,
    }


def main() -> None:
    """Plans a setting and keeps what it finds."""
    parser = command_line(__doc__)
    parser.add_argument("setting", type=names_of(SETTINGS), help=f"one of {', '.join(SETTINGS)}")
    arguments = parser.parse_args()
    with one_line_errors():
        found = plan(SETTINGS[arguments.setting])
        kept = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}
        kept[arguments.setting] = found
        ordered = {name: kept[name] for name in SETTINGS if name in kept}
        KEPT.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
        json.dump(found, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
