"""Weights on disk: Hugging Face folders, checkpoints of ours, runs; loading, saving, converting.

load_save        a model from any of them, a model into either
arguments        what load and save take, checked first
convert          one into the other, tensor by tensor, resumable
sources          what a path holds, and reading windows of its arrays
hf_export        the files of a Hugging Face folder: shards, index, config.json
safetensors      headers checked, ranges read
param_store      the arrays of an orbax checkpoint, read and written in windows
assets           tokenizer, config.json and other small files, as they came
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsjax.weights.load_save import Source, load_weights, locate, save_assets, save_weights

__all__ = ["Source", "load_weights", "locate", "save_assets", "save_weights"]


def __getattr__(name: str) -> Any:
    # Loaded when first used: `dsjax info` needs the table of tensors, and not orbax.
    if name not in __all__:
        raise AttributeError(f"module 'dsjax.weights' has no attribute {name!r}")
    from dsjax.weights import load_save

    return getattr(load_save, name)
