"""The text that a model is calibrated on: its beginning, as rows of the model's own tokens."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path as FilePath

import numpy as np

from dsjax.config import QuantisationConfig, SourceConfig
from dsjax.data.find_files import infer_format
from dsjax.data.sources import open_documents
from dsjax.data.tokenizer import TOKENIZER_FILE, load_tokenizer
from dsjax.quantise.search import is_searched
from dsjax.weights.sources import WeightSource
from dsjax.weights.stored_params import stored_params

# As in AWQ's and GPTQ's own runs. An expert of V2-Lite sees a tenth of the tokens.
NUM_ROWS, ROW_LENGTH = 128, 512


@dataclass(frozen=True)
class CalibrationText:
    """What a model is calibrated on.

    Attributes:
        tokens_BT: int32, rows of documents one after the other.
    """

    tokens_BT: np.ndarray

    @property
    def identity(self) -> str:
        """Tells it from another text."""
        return hashlib.sha256(self.tokens_BT.tobytes()).hexdigest()


def read_text(path: FilePath, source: WeightSource, recipe: QuantisationConfig) -> CalibrationText:
    """Reads the beginning of a text, with the model's own tokenizer.

    Args:
        path: a file, or a folder of files, of text, JSON lines or Parquet.
        source: the model.
        recipe: what it will be stored by.

    Raises:
        FileNotFoundError: there is no text.
        ValueError: it is empty, the model has no tokenizer, or nothing is there to search for.
    """
    forms = [form for _, form in stored_params(source.config, recipe).matrices.values()]
    if not any(map(is_searched, forms)):
        raise ValueError(
            "calibrate: the recipe stores nothing in 4 bits, and a text helps no other form"
        )
    if TOKENIZER_FILE not in source.assets:
        raise ValueError(
            f"calibrate: {source.where}: holds no {TOKENIZER_FILE} to read a text with"
        )
    if not path.exists():
        raise FileNotFoundError(f"calibrate: {path}: no such file or folder")
    tokenizer = load_tokenizer(str(source.assets[TOKENIZER_FILE]))
    documents = open_documents(SourceConfig(str(path), format=infer_format(path)))
    tokens: list[int] = []
    for number in range(len(documents)):
        tokens += tokenizer.encode_prompt(documents[number].text, parse_special=False)
        tokens.append(tokenizer.eos_id)
        if len(tokens) >= NUM_ROWS * ROW_LENGTH:
            break
    length = min(ROW_LENGTH, len(tokens), source.config.max_length)
    rows = min(NUM_ROWS, len(tokens) // length)
    array = np.asarray(tokens[: rows * length], np.int32).reshape(rows, length)
    if array.max() >= source.config.vocab_size:
        raise ValueError(
            f"calibrate: {source.assets[TOKENIZER_FILE]}: token {array.max()} is past the "
            f"model's vocabulary of {source.config.vocab_size}"
        )
    return CalibrationText(array)
