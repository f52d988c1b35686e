"""The small files of a model: config.json, tokenizer, chat template, as they came.

A checkpoint of ours and a run keep them in the folder `hf`, byte for byte, so that a Hugging Face
folder made from it has them again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsjax.data.chat import ADDITIONAL_TEMPLATES
from dsjax.data.generation_defaults import GENERATION_FILE
from dsjax.data.tokenizer import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from dsjax.data.tokenizer_files import write_byte_tokenizer
from dsjax.files import DRAFT_SUFFIX, copy_file, read_json, write_json
from dsjax.weights.safetensors import INDEX_NAME

ASSETS = "hf"

Assets = Mapping[str, Path]

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
# Files that describe the tokenizer; they go together.
_TOKENIZER_PREFIXES = (
    "tokenizer",
    "special_tokens",
    "added_tokens",
    "chat_template",
    ADDITIONAL_TEMPLATES,
    "vocab",
)
# Files that describe the weights beside them, so that other weights need their own.
_WEIGHT_FILES = ("config.json", INDEX_NAME)


def small_files(folder: Path) -> dict[str, Path]:
    """Returns the files of a folder that are no weights, by name; none if it is missing."""
    if not folder.is_dir():
        return {}
    files = [*folder.iterdir(), *(folder / ADDITIONAL_TEMPLATES).glob("*.jinja")]
    return {
        str(file.relative_to(folder)): file
        for file in sorted(files)
        if file.is_file() and not file.name.endswith((*_WEIGHT_SUFFIXES, DRAFT_SUFFIX))
    }


def copy_files(assets: Assets, folder: Path) -> None:
    """Copies files into a folder, each at once or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, file in assets.items():
        (folder / name).parent.mkdir(exist_ok=True)
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
        write_byte_tokenizer(run / ASSETS)
    else:
        path = Path(tokenizer).expanduser()
        folder = path if path.is_dir() else path.parent
        for name, file in small_files(folder).items():
            if name.startswith(_TOKENIZER_PREFIXES):
                kept[name] = file
        if path.is_file():
            kept[TOKENIZER_FILE] = path
    copy_files(kept, run / ASSETS)
    here = small_files(run / ASSETS)
    if GENERATION_FILE in kept and _tokenizer_bytes(here) != _tokenizer_bytes(assets):
        content = _without_ids(read_json(kept[GENERATION_FILE]))
        ids = dict(zip(("bos_token_id", "eos_token_id"), special_ids(here), strict=True))
        write_json(run / ASSETS / GENERATION_FILE, content | ids)


def _tokenizer_bytes(assets: Assets) -> bytes:
    return assets[TOKENIZER_FILE].read_bytes() if TOKENIZER_FILE in assets else b""


def _without_ids(content: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves out what names tokens by their ids, as another tokenizer has others."""
    named = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias")
    return {
        name: value
        for name, value in content.items()
        if not name.endswith("_token_id") and name not in named
    }


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
        for name in (GENERATION_FILE, "config.json"):
            if value is None:
                given = _json(assets, name).get(f"{key}_id")
                given = given[0] if isinstance(given, list) and given else given
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
