"""Weights on disk: Hugging Face folders, checkpoints of ours, runs; loading, saving, converting.

load_save        a model from any of them, a model into either
convert          one into the other, tensor by tensor, resumable
hf_table         Hugging Face tensors and our parameters: the one table
sources          what a path holds, and reading windows of its arrays
hf_export        the files of a Hugging Face folder: shards, index, config.json
safetensors_io   headers checked, ranges read
param_store      the arrays of an orbax checkpoint, read and written in windows
assets           tokenizer, config.json and other small files, as they came
strided_copy     transposing copies that fit the cache
progress         bytes done, on a terminal or in a log
"""

from dsjax.weights.load_save import Source, load_weights, locate, save_assets, save_weights

__all__ = ["Source", "load_weights", "locate", "save_assets", "save_weights"]
