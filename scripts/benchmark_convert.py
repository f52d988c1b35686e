"""Converts a random checkpoint of a model's full size to ours and back, and checks every bit.

    python scripts/benchmark_convert.py FOLDER [--model deepseek_v2_lite]

Each direction runs in a process of its own, whose peak resident memory is reported. FOLDER needs
room for the checkpoint twice. The script removes what it made there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Annotated

import jax.numpy as jnp
import numpy as np
import typer
from arguments import one_line_errors

from dsjax.config import ModelConfig
from dsjax.families import find_model_config, hf_table
from dsjax.progress import JobProgress
from dsjax.weights.hf_export import config_json, create_file, plan_shards, write_tensor
from dsjax.weights.safetensors import INDEX_NAME, SafetensorsFolder

_ITEM_BYTES = 2  # bfloat16


def random_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns finite bfloat16 values that follow from the name alone."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    bits = np.frombuffer(rng.bytes(int(np.prod(shape)) * _ITEM_BYTES), np.uint16)
    # Clearing one bit of the exponent leaves neither infinity nor NaN.
    return (bits & np.uint16(0xBFFF)).view(jnp.bfloat16).reshape(shape)


def write_checkpoint(config: ModelConfig, folder: Path, max_file_bytes: int) -> int:
    """Writes a random Hugging Face checkpoint, one tensor at a time; returns its bytes."""
    table = hf_table(config)
    plan = plan_shards(table, lambda _: jnp.dtype(jnp.bfloat16), max_file_bytes=max_file_bytes)
    folder.mkdir(parents=True)
    with JobProgress("making a checkpoint", plan.num_bytes, unit="bytes") as progress:
        for file, header in plan.headers.items():
            create_file(folder / file, header)
            for name, stored in header.tensors.items():
                write_tensor(folder / file, header, name, random_tensor(name, stored.shape))
                progress.advance(stored.stop - stored.start)
    if plan.index is not None:
        (folder / INDEX_NAME).write_bytes(plan.index)
    (folder / "config.json").write_bytes(config_json(config, "bfloat16", {}))
    return plan.num_bytes


def check_checkpoint(folder: Path) -> None:
    """Compares every tensor with what its name says; ends the program where one differs."""
    files = SafetensorsFolder(folder)
    size = sum(header.file_size for header in files.headers.values())
    with JobProgress("checking", size, unit="bytes") as progress:
        for name, (file, stored) in files.tensors.items():
            expected = random_tensor(name, stored.shape).reshape(-1).view(np.uint16)
            found = files.read(name, 0, expected.size).view(np.uint16)
            if not np.array_equal(found, expected):
                raise SystemExit(f"{file}: tensor {name} differs")
            progress.advance(stored.stop - stored.start)
    files.close()


def fingerprint(folder: Path) -> dict[str, str]:
    """Returns a hash of every header and of every other file."""
    hashes = {}
    for file in sorted(folder.iterdir()):
        if file.suffix == ".safetensors":
            with file.open("rb") as opened:
                length = opened.read(8)
                content = length + opened.read(int.from_bytes(length, "little"))
            content += str(file.stat().st_size).encode()
        else:
            content = file.read_bytes()
        hashes[file.name] = hashlib.sha256(content).hexdigest()
    return hashes


def convert_in_process(src: Path, dst: Path) -> tuple[float, float]:
    """Runs `dsjax.weights.convert.convert` by itself; returns seconds and peak resident GB."""
    code = "import sys; from dsjax.weights.convert import convert; convert(*sys.argv[1:])"
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", code, str(src), str(dst)])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"converting {src} failed")
    return time.perf_counter() - start, usage.ru_maxrss * 1024 / 1e9


def main(
    folder: Annotated[Path, typer.Argument(help="Where there is room for it twice.")],
    model: Annotated[str, typer.Option(help="Config.")] = "deepseek_v2_lite",
    overrides: Annotated[list[str] | None, typer.Option("--set", help="FIELD=VALUE.")] = None,
    file_gb: Annotated[float, typer.Option(help="Size at which a file ends.", min=1e-9)] = 8.6,
) -> None:
    """Converts a random checkpoint of a model's full size to ours and back; checks every bit."""
    config = find_model_config(model, overrides or ())
    source, ours, back = folder / "source", folder / "ours", folder / "back"
    for path in (source, ours, back):  # they are removed at the end
        if path.exists():
            raise ValueError(f"{path}: is there already; give another folder")
    try:
        size = write_checkpoint(config, source, int(file_gb * 1e9)) / 1e9
        before = fingerprint(source)
        there = convert_in_process(source, ours)
        shutil.rmtree(source)
        home = convert_in_process(ours, back)
        shutil.rmtree(ours)
        if fingerprint(back) != before:
            raise SystemExit("the files that came back differ from those that went in")
        check_checkpoint(back)
    finally:
        for made in (source, ours, back):
            shutil.rmtree(made, ignore_errors=True)
            shutil.rmtree(made.with_name(made.name + ".partial"), ignore_errors=True)
    for direction, (seconds, peak) in {"HF to ours": there, "ours to HF": home}.items():
        row = {
            "direction": direction,
            "gb": round(size, 2),
            "tensors": len(hf_table(config).tensors),
            "seconds": round(seconds, 1),
            "gb_per_second": round(size / seconds, 3),
            "peak_rss_gb": round(peak, 2),
        }
        print(json.dumps(row))
    print("every tensor, header and small file came back equal bit by bit")


if __name__ == "__main__":
    with one_line_errors():
        typer.run(main)
