"""Tokenizers written as Hugging Face files: one trained on a corpus, and the raw bytes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from dsjax.data.tokenizer import (
    BOS_TOKEN,
    BYTE_ALPHABET,
    BYTES_BOS_TOKEN,
    BYTES_EOS_TOKEN,
    EOS_TOKEN,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    Tokenizer,
    load_tokenizer,
)
from dsjax.files import read_json, write_json, write_text

# DeepSeek's cuts: line ends, words and punctuation with a space before them, digits one by one. One
# pattern of alternatives takes half the time of their five passes, one after the other.
_WORDS = r"[\r\n]|\s?\p{L}+|\s?[\p{P}\p{S}]+|\p{N}|[^\S\r\n]+(?=\s)|\s"


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: str | Path) -> Tokenizer:
    """Trains byte-level BPE as DeepSeek's is: digits one by one, BOS and EOS as the last ids.

    Args:
        texts: the corpus.
        vocab_size: ids in all, BOS and EOS included; a small corpus may give fewer.
        folder: where `tokenizer.json` and `tokenizer_config.json` are written.

    Returns:
        The tokenizer, loaded from there.

    Raises:
        ValueError: when vocab_size leaves no room for the 256 bytes and two special tokens.
    """
    if vocab_size < 258:
        raise ValueError(f"vocab_size={vocab_size} must be at least 258: 256 bytes, BOS, EOS")
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        initial_alphabet=sorted(BYTE_ALPHABET),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    _write(bpe, BOS_TOKEN, EOS_TOKEN, Path(folder))
    return load_tokenizer(str(folder))


def write_byte_tokenizer(folder: Path) -> None:
    """Writes the tokenizer "bytes" as files: the 256 bytes, BOS 256 and EOS 257.

    Other software reads them, and `load_tokenizer` gives the same ids for them.
    """
    bytes_only = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(BYTE_ALPHABET)}, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    _write(bytes_only, BYTES_BOS_TOKEN, BYTES_EOS_TOKEN, folder)


def mend_tokenizer(folder: Path) -> bool:
    """Lets other software put BOS first, where an older version of ours wrote a tokenizer.

    Those had no post-processor, and without one other software leaves BOS out. Files of anybody
    else stay as they are.

    Returns:
        Whether the folder's `tokenizer.json` was such a file.
    """
    file, config_file = folder / TOKENIZER_FILE, folder / TOKENIZER_CONFIG_FILE
    if not file.is_file() or not config_file.is_file():
        return False
    config = read_json(config_file)
    bos, eos = config.get("bos_token"), config.get("eos_token")
    known = ((BOS_TOKEN, EOS_TOKEN), (BYTES_BOS_TOKEN, BYTES_EOS_TOKEN))
    if (bos, eos) not in known or config != _config(str(bos), str(eos)):
        return False
    if read_json(file).get("post_processor", {}) is not None:
        return False
    bpe = tokenizers.Tokenizer.from_file(str(file))
    _add_bos(bpe, str(bos))
    write_text(file, bpe.to_str(pretty=True))
    return True


def _write(bpe: tokenizers.Tokenizer, bos: str, eos: str, folder: Path) -> None:
    """Adds the special tokens and writes both files; `tokenizer.json` last."""
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in (bos, eos)])
    _add_bos(bpe, bos)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / TOKENIZER_CONFIG_FILE, _config(bos, eos))
    write_text(folder / TOKENIZER_FILE, bpe.to_str(pretty=True))


def _add_bos(bpe: tokenizers.Tokenizer, bos: str) -> None:
    # Other software adds BOS by what the file says, and the model was trained with it.
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos} $B:1",
        special_tokens=[(bos, bpe.token_to_id(bos))],
    )


def _config(bos: str, eos: str) -> dict[str, Any]:
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": eos,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
