"""The small files of a model: config.json, tokenizer, chat template, as they came.

A checkpoint of ours and a run keep them in the folder `hf`, byte for byte, so that a Hugging Face
folder made from it has them again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsjax.data.tokenizer import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from dsjax.data.tokenizer_files import write_byte_tokenizer
from dsjax.files import DRAFT_SUFFIX, copy_file, read_json
from dsjax.weights.safetensors import INDEX_NAME

ASSETS = "hf"

Assets = Mapping[str, Path]

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
# Files that describe the tokenizer; they go together.
_TOKENIZER_PREFIXES = ("tokenizer", "special_tokens", "added_tokens", "chat_template", "vocab")
# Files that describe the weights beside them, so that other weights need their own.
_WEIGHT_FILES = ("config.json", INDEX_NAME)


def small_files(folder: Path) -> dict[str, Path]:
    """Returns the files of a folder that are no weights, by name; none if it is missing."""
    if not folder.is_dir():
        return {}
    return {
        file.name: file
        for file in sorted(folder.iterdir())
        if file.is_file() and not file.name.endswith((*_WEIGHT_SUFFIXES, DRAFT_SUFFIX))
    }


def copy_files(assets: Assets, folder: Path) -> None:
    """Copies files into a folder, each at once or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, file in assets.items():
        copy_file(file, folder / name)


def save_assets(tokenizer: str, assets: Assets, run: Path) -> None:
    """Gives a run the files that a Hugging Face checkpoint made from it will need.

    Args:
        tokenizer: "bytes", the path of a `tokenizer.json`, or of a folder that holds one.
        assets: files of the model that the run starts from.
        run: the run's folder; the files go to its folder `hf`.
    """
    kept = {
        name: file
        for name, file in assets.items()
        if name not in _WEIGHT_FILES and not name.startswith(_TOKENIZER_PREFIXES)
    }
    if tokenizer == "bytes":
        copy_files(kept, run / ASSETS)
        write_byte_tokenizer(run / ASSETS)
        return
    path = Path(tokenizer).expanduser()
    folder = path if path.is_dir() else path.parent
    for name, file in small_files(folder).items():
        if name.startswith(_TOKENIZER_PREFIXES):
            kept[name] = file
    if path.is_file():
        kept[TOKENIZER_FILE] = path
    copy_files(kept, run / ASSETS)


def special_ids(assets: Assets) -> tuple[int | None, int | None]:
    """Returns the ids that begin and end a document, as far as the files say.

    The tokenizer's own files come first, then `generation_config.json` and `config.json`.
    """
    found: list[int | None] = []
    vocab = _vocabulary(assets)
    for key in ("bos_token", "eos_token"):
        token = _json(assets, TOKENIZER_CONFIG_FILE).get(key)
        token = token.get("content") if isinstance(token, dict) else token
        value = vocab.get(token) if isinstance(token, str) else None
        for name in ("generation_config.json", "config.json"):
            if value is None:
                given = _json(assets, name).get(f"{key}_id")
                value = given if isinstance(given, int) else None
        found.append(value)
    return found[0], found[1]


def _vocabulary(assets: Assets) -> dict[str, int]:
    content = _json(assets, TOKENIZER_FILE)
    model = content.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    added = {token["content"]: token["id"] for token in content.get("added_tokens", ())}
    return (dict(vocab) if isinstance(vocab, dict) else {}) | added


def _json(assets: Assets, name: str) -> dict[str, Any]:
    return read_json(assets[name]) if name in assets else {}
