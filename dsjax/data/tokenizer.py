"""Tokenizers: raw bytes, or byte-level BPE from a Hugging Face `tokenizer.json`.

DeepSeek's tokenizers are all byte-level BPE, so a token is a fixed string of bytes. One table from
id to bytes therefore gives decoding, streaming without ever cutting a character in two, and the
number of bytes a target stands for (bits per byte), with no help from the tokenizer library.
"""

from __future__ import annotations

import abc
import codecs
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from dsjax.data.chat import ChatTemplate, read_chat_template

BOS_TOKEN = "<｜begin▁of▁sentence｜>"
EOS_TOKEN = "<｜end▁of▁sentence｜>"

# Names tried when no tokenizer_config.json says which tokens begin and end a text.
_KNOWN_BOS = (BOS_TOKEN, "<|begin_of_text|>", "<s>", "<|endoftext|>")
_KNOWN_EOS = (EOS_TOKEN, "<|end_of_text|>", "</s>", "<|endoftext|>")

# DeepSeek's cuts: line ends, words and punctuation with a space before them, digits one by one. One
# pattern of alternatives takes half the time of their five passes, one after the other.
_WORDS = r"[\r\n]|\s?\p{L}+|\s?[\p{P}\p{S}]+|\p{N}|[^\S\r\n]+(?=\s)|\s"


class Tokenizer(abc.ABC):
    """Text to token ids and back.

    Attributes:
        spec: what `load_tokenizer` was given.
        sha256: of the vocabulary file; "bytes" for raw bytes.
        bos_id: id that begins every text.
        eos_id: id that ends every text.
        special_ids: ids that are no part of the text.
        chat_template: the template that turns messages into a prompt, or None.
    """

    def __init__(
        self,
        spec: str,
        sha256: str,
        token_bytes: Sequence[bytes],
        bos_id: int,
        eos_id: int,
        special_ids: frozenset[int],
        chat_template: ChatTemplate | None = None,
    ) -> None:
        self.spec = spec
        self.sha256 = sha256
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.special_ids = special_ids
        self.chat_template = chat_template
        self._token_bytes = list(token_bytes)
        self._token_lengths = np.array(
            [0 if i in special_ids else len(b) for i, b in enumerate(token_bytes)], np.int32
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return load_tokenizer, (self.spec,)

    @property
    def vocab_size(self) -> int:
        """Number of ids, the special ones included; a model's table may be larger."""
        return len(self._token_bytes)

    @abc.abstractmethod
    def encode(self, text: str, *, parse_special: bool = True) -> list[int]:
        """Ids of a text, with no BOS or EOS added.

        Args:
            text: any text.
            parse_special: whether a special token written out in the text becomes its id, as
                prompts need, or stays text, as documents need.

        Returns:
            Token ids.
        """

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a prompt, BOS first and exactly once, also when the text already spells it."""
        ids = self.encode(text)
        start = 0
        while start < len(ids) and ids[start] == self.bos_id:
            start += 1
        return [self.bos_id, *ids[start:]]

    def encode_document(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids of a training document, BOS + text + EOS, and the bytes each stands for.

        Args:
            text: the document; special tokens written out in it stay text.

        Returns:
            (ids, num_bytes), both int32 [num_tokens]; num_bytes sums to the text's UTF-8 length.
        """
        ids = [self.bos_id, *self.encode(text, parse_special=False), self.eos_id]
        tokens = np.array(ids, np.int32)
        ends = np.cumsum(self._token_lengths[tokens], dtype=np.int64)
        total = len(text.encode("utf-8"))
        # A tokenizer that normalises changes the text's length; its bytes are shared out evenly.
        if ends[-1] != total and ends[-1] > 0:
            ends = ends * total // ends[-1]
        return tokens, np.diff(ends, prepend=0).astype(np.int32)

    def bytes_of(self, token: int) -> bytes:
        """Bytes of one token; ids past the vocabulary (padding of a model's table) have none."""
        return self._token_bytes[token] if 0 <= token < len(self._token_bytes) else b""

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of some ids; bytes that are no UTF-8 become U+FFFD.

        Args:
            ids: token ids.
            skip_special: whether special tokens are left out.

        Returns:
            The text.
        """
        skipped = self.special_ids if skip_special else frozenset[int]()
        data = b"".join(self.bytes_of(int(i)) for i in ids if int(i) not in skipped)
        return data.decode("utf-8", errors="replace")

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt text of a conversation, BOS included, for `encode_prompt`.

        Args:
            messages: dicts with "role" and "content".
            tools: JSON schemas of functions the model may call.
            add_generation_prompt: whether the text ends where the assistant's answer begins.

        Returns:
            The prompt.

        Raises:
            ValueError: without a chat template, or when the template refuses the messages.
        """
        if self.chat_template is None:
            raise ValueError(f"tokenizer {self.spec!r} has no chat template")
        return self.chat_template.render(messages, tools, add_generation_prompt)


class ByteTokenizer(Tokenizer):
    """The 256 bytes, BOS (256) and EOS (257)."""

    def __init__(self) -> None:
        table = [bytes([i]) for i in range(256)] + [b"", b""]
        super().__init__("bytes", "bytes", table, 256, 257, frozenset({256, 257}))

    def encode(self, text: str, *, parse_special: bool = True) -> list[int]:
        """The text's UTF-8 bytes; the special tokens have no spelling, so none is parsed."""
        del parse_special
        return list(text.encode("utf-8"))


class BpeTokenizer(Tokenizer):
    """Byte-level BPE from a `tokenizer.json`."""

    def __init__(self, path: Path, spec: str) -> None:
        text = _read_text(path)
        config = _read_json(path.parent / "tokenizer_config.json")
        try:
            description = json.loads(text)
            self._parsing = tokenizers.Tokenizer.from_str(text)
            self._plain = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises a bare Exception
            raise ValueError(f"{path}: not a tokenizer.json: {error}") from None
        if not _is_byte_level(description.get("decoder")):
            kind = (description.get("decoder") or {}).get("type")
            raise ValueError(f"{path}: decoder {kind!r} is not supported, only byte-level BPE is")
        self._plain.encode_special_tokens = True
        for encoder in (self._parsing, self._plain):
            encoder.no_truncation()
            encoder.no_padding()
        vocab = self._parsing.get_vocab(with_added_tokens=True)
        added = {token["content"]: token for token in description.get("added_tokens", ())}
        table = [b""] * (max(vocab.values()) + 1)
        for token, index in vocab.items():
            table[index] = token.encode("utf-8") if token in added else _to_bytes(token, path)
        special = frozenset(t["id"] for t in added.values() if t["special"])
        bos = _special_token(config, "bos_token", _KNOWN_BOS, vocab, path)
        eos = _special_token(config, "eos_token", _KNOWN_EOS, vocab, path)
        super().__init__(
            spec,
            hashlib.sha256(text.encode("utf-8")).hexdigest(),
            table,
            vocab[bos],
            vocab[eos],
            special | {vocab[bos], vocab[eos]},
            read_chat_template(path.parent, config, bos, eos),
        )

    def encode(self, text: str, *, parse_special: bool = True) -> list[int]:
        """Ids of a text; whatever BOS the file's post-processor would add is left out."""
        encoder = self._parsing if parse_special else self._plain
        # The fast call leaves out offsets; it takes two thirds of the time.
        return encoder.encode_batch_fast([text], add_special_tokens=False)[0].ids


class StreamDecoder:
    """Decodes ids one by one; the pieces joined are what `decode` gives for all of them.

    Bytes of an unfinished UTF-8 character are held back until the character is complete.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset[int]()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """Text that one more id completes; "" while a character is unfinished."""
        if token in self._skipped:
            return ""
        return self._decoder.decode(self._tokenizer.bytes_of(token))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that never got complete."""
        return self._decoder.decode(b"", final=True)


def load_tokenizer(spec: str) -> Tokenizer:
    """Loads a tokenizer.

    Args:
        spec: "bytes", the path of a `tokenizer.json`, or of a folder that holds one.

    Returns:
        The tokenizer.

    Raises:
        ValueError: when there is no such file, or it is no byte-level BPE.
    """
    if spec == "bytes":
        return ByteTokenizer()
    path = Path(spec).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f'tokenizer={spec!r} must be "bytes" or lead to a tokenizer.json')
    return BpeTokenizer(path, spec)


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: str | Path) -> Tokenizer:
    """Trains byte-level BPE as DeepSeek's is: digits one by one, BOS and EOS as the last ids.

    Args:
        texts: the corpus.
        vocab_size: ids in all, BOS and EOS included; a small corpus may give fewer.
        path: folder to write `tokenizer.json` and `tokenizer_config.json` to.

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
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.add_special_tokens(
        [tokenizers.AddedToken(token, normalized=False) for token in (BOS_TOKEN, EOS_TOKEN)]
    )
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": BOS_TOKEN,
        "eos_token": EOS_TOKEN,
        "pad_token": EOS_TOKEN,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False))
    (folder / "tokenizer.json").write_text(bpe.to_str(pretty=True), encoding="utf-8")
    return load_tokenizer(str(path))


def _byte_alphabet() -> dict[str, int]:
    """The printable character that byte-level BPE writes for each byte, inverted."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _to_bytes(token: str, path: Path) -> bytes:
    try:
        return bytes(_BYTE_OF[character] for character in token)
    except KeyError:
        raise ValueError(f"{path}: token {token!r} is not byte-level") from None


def _is_byte_level(decoder: dict[str, Any] | None) -> bool:
    if not decoder:
        return False
    if decoder["type"] == "Sequence":
        return len(decoder["decoders"]) == 1 and _is_byte_level(decoder["decoders"][0])
    return decoder["type"] == "ByteLevel"


def _special_token(
    config: dict[str, Any], key: str, known: tuple[str, ...], vocab: dict[str, int], path: Path
) -> str:
    named = config.get(key)
    token = named["content"] if isinstance(named, dict) else named
    if token is not None:
        if token not in vocab:
            raise ValueError(f"{path}: {key}={token!r} is not in the vocabulary")
        return token
    found = [candidate for candidate in known if candidate in vocab]
    if not found:
        raise ValueError(f"{path}: no {key}: name it in tokenizer_config.json beside the file")
    return found[0]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
