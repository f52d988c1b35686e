"""Tokens that mark turns and texts, and keeping those that a message spells from being any.

A marker is a token that its file calls special, or one that plainly is none of a text: written in
brackets, as `<｜User｜>` is, which DeepSeek-V2.5 does not call special, or spelled out by the chat
template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

_BRACKETED = re.compile(r"<[^\s<>]+>|\[[^\s\[\]]+\]|＜[^\s＜＞]+＞")
# What Unicode sets aside for use inside of programs; no text has them.
_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


def is_marker(token: Mapping[str, Any], templates: Iterable[str]) -> bool:
    """Whether an added token of a `tokenizer.json` is a marker.

    Args:
        token: the entry of the file.
        templates: the chat templates that go with it.
    """
    text = token["content"]
    if token["special"] or _BRACKETED.fullmatch(text):
        return True
    # Runs of spaces and single characters are added for what they are.
    return len(text) > 2 and not text.isspace() and any(text in source for source in templates)


class Markers:
    """The markers of a tokenizer, as they are spelled."""

    def __init__(
        self, ids: Mapping[str, int], left: Collection[str] = (), right: Collection[str] = ()
    ) -> None:
        """Makes the markers.

        Args:
            ids: of each spelling.
            left: spellings of those that take the white space before them.
            right: spellings of those that take the white space after them.
        """
        self.ids = {text: ids[text] for text in sorted(ids, key=len, reverse=True) if text}
        alternatives = (
            (r"\s*" if text in left else "")
            + f"(?:{re.escape(text)})"
            + (r"\s*" if text in right else "")
            for text in self.ids
        )
        # The longest first, as one may begin another.
        self._spelled = re.compile("|".join(map(re.escape, self.ids)))
        self._in_prompt = re.compile("|".join(alternatives))
        begun = {text[:size] for text in self.ids for size in range(1, len(text))}
        longest_first = sorted(map(re.escape, begun), key=len, reverse=True)
        # One that a string begins may be ended by the next, where a template joins them.
        self._begun = re.compile(rf"({'|'.join(longest_first)})(\s*)\Z")

    def tear(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        looked_for: Collection[str] = (),
    ) -> tuple[Any, Any, str]:
        """Tears markers apart that messages and tools spell, by a character that they do not have.

        Args:
            messages: of a conversation.
            tools: that it may use.
            looked_for: strings that the chat template looks for. Where an assistant's message has
                such a marker, as `</think>`, it stays whole for the template.

        Returns:
            Both, torn, and the character.

        Raises:
            ValueError: the messages have every character that could be taken.
        """
        content = json.dumps([messages, tools], ensure_ascii=False, default=str)
        unused = [c for c in _NONCHARACTERS if c not in content and _escaped(c) not in content]
        if not unused:
            raise ValueError("messages hold all characters that Unicode sets aside for programs")
        mark = unused[0]
        kept = {text for text in self.ids if any(text in one for one in looked_for)}

        def tear(value: Any, keep: Collection[str]) -> Any:
            if isinstance(value, str):
                torn = self._spelled.sub(
                    lambda found: (
                        found[0] if found[0] in keep else found[0][0] + mark + found[0][1:]
                    ),
                    value,
                )
                return self._begun.sub(rf"\g<1>{mark}\g<2>", torn)
            if isinstance(value, Mapping):
                return {tear(key, keep): tear(item, keep) for key, item in value.items()}
            if isinstance(value, list | tuple):
                return [tear(item, keep) for item in value]
            return value

        torn = [tear(m, kept if m.get("role") == "assistant" else ()) for m in messages]
        return torn, tear(tools, ()), mark

    def split(self, text: str, mark: str) -> Iterator[str | int]:
        """Gives a torn text piece by piece: mended text, and the ids of markers in between."""
        start = 0
        for found in self._in_prompt.finditer(text):
            yield _mended(text[start : found.start()], mark)
            spelling = found[0] if found[0] in self.ids else found[0].strip()
            yield self.ids[spelling]
            start = found.end()
        yield _mended(text[start:], mark)


def _escaped(mark: str) -> str:
    return json.dumps(mark)[1:-1]


def _mended(text: str, mark: str) -> str:
    # A template may write JSON in ASCII.
    return text.replace(mark, "").replace(_escaped(mark), "")
