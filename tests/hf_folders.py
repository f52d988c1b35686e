"""Hugging Face folders for tests, written as other software writes them."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from numpy.typing import DTypeLike

from dsjax.config import ModelConfig
from dsjax.families import hf_tensor_shapes, to_hf_config
from dsjax.weights.convert import convert
from dsjax.weights.safetensors import INDEX_NAME

INV_FREQ = "model.layers.0.self_attn.rotary_emb.inv_freq"


def make_folder(
    folder: Path,
    config: ModelConfig,
    dtype: DTypeLike = jnp.bfloat16,
    num_files: int = 3,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Writes a checkpoint with the format's own library, and returns its tensors by name."""
    rng = np.random.default_rng(seed)
    tensors = {
        name: rng.standard_normal(shape).astype(dtype)
        for name, shape in hf_tensor_shapes(config).items()
    }
    folder.mkdir()
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number in range(num_files):
        file = f"model-{number + 1:05d}-of-{num_files:06d}.safetensors"  # not our own pattern
        group = names[number::num_files]
        weight_map |= dict.fromkeys(group, file)
        part = {name: tensors[name] for name in group}
        safetensors.numpy.save_file(part, folder / file, {"format": "pt", "made": "elsewhere"})
    if num_files > 1:
        content = {"weight_map": weight_map, "metadata": {"total_size": 7}}
        (folder / INDEX_NAME).write_text(json.dumps(content))
    dtype_name = jnp.dtype(dtype).name
    hf = to_hf_config(config, dtype=dtype_name, bos_id=1, eos_id=2) | {"auto_map": [1, "é"]}
    (folder / "config.json").write_text(json.dumps(hf, indent=3))
    (folder / "generation_config.json").write_text('{"temperature": 0.3}')
    (folder / "tokenizer.json").write_bytes(bytes(range(256)))
    (folder / "modeling_deepseek.py").write_text("raise SystemExit\n")
    return tensors


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def convert_quietly(src: Path, dst: Path, **options: Any) -> None:
    convert(src, dst, progress=False, **options)
