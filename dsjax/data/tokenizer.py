"""Tokenizers: raw bytes, or byte-level BPE from a Hugging Face `tokenizer.json`.

DeepSeek's tokenizers are all byte-level BPE: a token is a fixed string of bytes. So one table from
id to bytes gives decoding, streaming that never cuts a character in two, and the number of bytes a
target stands for (bits per byte).
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

from dsjax.data.chat import ChatTemplate, read_chat_template
from dsjax.data.markers import Markers, is_marker
from dsjax.files import read_json, read_text

BOS_TOKEN = "<｜begin▁of▁sentence｜>"
EOS_TOKEN = "<｜end▁of▁sentence｜>"
# Those of the raw bytes, where they are written as files.
BYTES_BOS_TOKEN = "<|begin_of_text|>"
BYTES_EOS_TOKEN = "<|end_of_text|>"

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"

# Names tried when no tokenizer_config.json says which tokens begin and end a text.
_KNOWN_BOS = (BOS_TOKEN, BYTES_BOS_TOKEN, "<s>", "<|endoftext|>")
_KNOWN_EOS = (EOS_TOKEN, BYTES_EOS_TOKEN, "</s>", "<|endoftext|>")


def _byte_alphabet() -> str:
    """Returns the printable character that byte-level BPE writes for each byte."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return "".join(chr(byte if byte in printable else next(others)) for byte in range(256))


BYTE_ALPHABET = _byte_alphabet()
_BYTE_OF = {character: byte for byte, character in enumerate(BYTE_ALPHABET)}


class Tokenizer(abc.ABC):
    """Text to token ids and back.

    Attributes:
        spec: what `load_tokenizer` was given.
        sha256: of the vocabulary file; "bytes" for raw bytes.
        bos_id: id that begins every text.
        eos_id: id that ends every text.
        special_ids: ids that are no part of the text.
        known_ids: bool [vocab_size], whether an id has a token; files may leave ids out.
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
        unknown_ids: frozenset[int] = frozenset(),
        markers: Markers | None = None,
    ) -> None:
        self.spec = spec
        self.sha256 = sha256
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.special_ids = special_ids
        self.chat_template = chat_template
        self._token_bytes = list(token_bytes)
        self.known_ids = np.array([i not in unknown_ids for i in range(len(token_bytes))], np.bool_)
        self.known_ids.flags.writeable = False
        spellings = {token_bytes[i].decode("utf-8", "replace"): i for i in special_ids}
        self._markers = Markers(spellings) if markers is None else markers
        self._token_lengths = np.array(
            [0 if i in special_ids else len(b) for i, b in enumerate(token_bytes)], np.int32
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return load_tokenizer, (self.spec,)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.spec!r}, {self.vocab_size:,} tokens)"

    @property
    def vocab_size(self) -> int:
        """The number of ids, with the special ones; a model's table may be larger."""
        return len(self._token_bytes)

    @property
    def marker_ids(self) -> Mapping[str, int]:
        """The ids of tokens that mark something, by spelling; no text that is written has one."""
        return self._markers.ids

    @abc.abstractmethod
    def encode(self, text: str, *, parse_special: bool = True) -> list[int]:
        """Returns the ids of a text, with no BOS or EOS added.

        Args:
            text: any text.
            parse_special: whether a special token written out in the text becomes its id, as
                prompts need, or stays text, as documents need.

        Returns:
            Token ids.
        """

    def encode_prompt(self, text: str, *, parse_special: bool = True) -> list[int]:
        """Returns the ids of a prompt; BOS comes first and once, also when the text spells it."""
        return self._with_bos(self.encode(text, parse_special=parse_special))

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        *,
        template: str | None = None,
        parse_special: bool = False,
        arguments: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Returns the ids of a conversation, with BOS.

        Args:
            messages: dicts with "role" and "content".
            tools: JSON schemas of functions the model may call.
            add_generation_prompt: whether it ends where the assistant's answer begins.
            template: the name of one of several templates; see `ChatTemplate.render`.
            parse_special: whether special tokens written out in messages and tools become their
                ids. If not, they stay text, so that no user can end a turn or begin another's;
                those of the template always become ids. Special is whatever marks something,
                though its file may not call it so.
            arguments: what else the template reads.

        Raises:
            ValueError: without a chat template, or when the template refuses the messages.
        """
        if parse_special or not self._markers.ids:
            text = self.apply_chat_template(
                messages, tools, add_generation_prompt, template, arguments=arguments
            )
            return self.encode_prompt(text)
        looked_for = self.chat_template.looked_for if self.chat_template is not None else ()
        torn, torn_tools, mark = self._markers.tear(messages, tools, looked_for)
        text = self.apply_chat_template(
            torn, torn_tools, add_generation_prompt, template, arguments=arguments
        )
        ids: list[int] = []
        for piece in self._markers.split(text, mark):
            ids += [piece] if isinstance(piece, int) else self.encode(piece, parse_special=False)
        return self._with_bos(ids)

    def _with_bos(self, ids: list[int]) -> list[int]:
        start = 0
        while start < len(ids) and ids[start] == self.bos_id:
            start += 1
        return [self.bos_id, *ids[start:]]

    def encode_document(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ids of a document, BOS + text + EOS, and the bytes each stands for.

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
        """Returns the bytes of a token; ids past the vocabulary have none."""
        return self._token_bytes[token] if 0 <= token < len(self._token_bytes) else b""

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Returns the text of some ids; bytes that are no UTF-8 become U+FFFD.

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
        template: str | None = None,
        *,
        arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """Returns the text of a conversation, with BOS, for `encode_prompt`.

        The arguments are those of `ChatTemplate.render`.

        Raises:
            ValueError: without a chat template, or when the template refuses the messages.
        """
        if self.chat_template is None:
            raise ValueError(f"tokenizer {self.spec!r} has no chat template")
        return self.chat_template.render(
            messages, tools, add_generation_prompt, template, arguments
        )


class ByteTokenizer(Tokenizer):
    """The 256 bytes, BOS (256) and EOS (257)."""

    def __init__(self) -> None:
        table = [bytes([i]) for i in range(256)] + [b"", b""]
        super().__init__("bytes", "bytes", table, 256, 257, frozenset({256, 257}))

    def encode(self, text: str, *, parse_special: bool = True) -> list[int]:
        """Returns the text's UTF-8 bytes; special tokens have no spelling, so none is parsed."""
        del parse_special
        return list(text.encode("utf-8"))


class BpeTokenizer(Tokenizer):
    """Byte-level BPE from a `tokenizer.json`."""

    def __init__(self, path: Path, spec: str) -> None:
        text = read_text(path)
        config_file = path.parent / TOKENIZER_CONFIG_FILE
        config = read_json(config_file) if config_file.is_file() else {}
        try:
            description = json.loads(text)
            self._parsing = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises a bare Exception
            raise ValueError(f"{path}: not a tokenizer.json: {error}") from None
        if not _is_byte_level(description.get("decoder")):
            kind = (description.get("decoder") or {}).get("type")
            raise ValueError(f"{path}: decoder {kind!r} is not supported, only byte-level BPE is")
        vocab = self._parsing.get_vocab(with_added_tokens=True)
        added = {token["content"]: token for token in description.get("added_tokens", ())}
        table = [b""] * (max(vocab.values()) + 1)
        for token, index in vocab.items():
            table[index] = token.encode("utf-8") if token in added else _to_bytes(token, path)
        # By the library's ids, which are not always those that the file names.
        special = frozenset(vocab[t["content"]] for t in added.values() if t["special"])
        bos = _special_token(config, "bos_token", _KNOWN_BOS, vocab, path)
        eos = _special_token(config, "eos_token", _KNOWN_EOS, vocab, path)
        template = read_chat_template(path.parent, config, bos, eos)
        sources = () if template is None else template.sources.values()
        marked = [t for t in added.values() if is_marker(t, sources) or t["content"] in (bos, eos)]
        # The library leaves special tokens unparsed where it is told to, and no others.
        for token in marked:
            token["special"] = True
        self._plain = tokenizers.Tokenizer.from_str(json.dumps(description))
        self._plain.encode_special_tokens = True
        for encoder in (self._parsing, self._plain):
            encoder.no_truncation()
            encoder.no_padding()
        spellings = {text: vocab[text] for text in (bos, eos, *(t["content"] for t in marked))}
        super().__init__(
            spec,
            hashlib.sha256(text.encode("utf-8")).hexdigest(),
            table,
            vocab[bos],
            vocab[eos],
            special | {vocab[bos], vocab[eos]},
            template,
            frozenset(range(len(table))).difference(vocab.values()),
            Markers(
                spellings,
                left={t["content"] for t in marked if t.get("lstrip")},
                right={t["content"] for t in marked if t.get("rstrip")},
            ),
        )

    def encode(self, text: str, *, parse_special: bool = True) -> list[int]:
        """Returns the ids of a text, without the BOS that the file's post-processor may add."""
        encoder = self._parsing if parse_special else self._plain
        # The fast call leaves out offsets; it takes two thirds of the time.
        return encoder.encode_batch_fast([text], add_special_tokens=False)[0].ids


class StreamDecoder:
    """Decodes ids one by one; the pieces joined are what `decode` gives for all of them.

    Bytes of an unfinished UTF-8 character are held back until the character is complete.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special: bool = True,
        hidden: frozenset[int] | None = None,
    ) -> None:
        """Begins an empty text.

        Args:
            tokenizer: makes bytes of ids.
            skip_special: whether special tokens are left out.
            hidden: the ids to leave out; None leaves it to `skip_special`.
        """
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset[int]()
        self._skipped = self._skipped if hidden is None else hidden
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """Returns the text that one more id completes; "" while a character is unfinished."""
        if token in self._skipped:
            return ""
        return self._decoder.decode(self._tokenizer.bytes_of(token))

    def flush(self) -> str:
        """Returns what is left at the end: U+FFFD for an unfinished character."""
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
        path = path / TOKENIZER_FILE
    if not path.is_file():
        raise ValueError(f'tokenizer={spec!r} must be "bytes" or lead to a tokenizer.json')
    return BpeTokenizer(path, spec)


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
        raise ValueError(f"{path}: no {key}: name it in {TOKENIZER_CONFIG_FILE} beside the file")
    return found[0]
