"""How DeepSeek's models think and call functions, as their text has it.

Three ways to write a call were released. V2.5, V3 and R1 (and Coder-V2 of July 2024) write its name
on a line and its arguments in a fence; V3.1 writes both on one line. V2-Chat was tuned on neither:
it is told V2.5's way, whose marks are no tokens of its vocabulary and are spelled out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
SEPARATOR = "<｜tool▁sep｜>"
THINK, END_OF_THINKING = "<think>", "</think>"
CALL_MARKS = (CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, SEPARATOR)


@dataclass(frozen=True)
class ChatFormat:
    """A family's way to think and to call functions.

    Attributes:
        layout: "fenced" or "plain": how a call's name and arguments are written.
        marks_are_tokens: whether the marks of calls are tokens, which no text can spell.
        thinks: whether an answer may begin with thoughts, up to `</think>`.
    """

    layout: Literal["fenced", "plain"] = "fenced"
    marks_are_tokens: bool = True
    thinks: bool = False

    @property
    def marks(self) -> tuple[str, ...]:
        """The marks that its answers may have."""
        return (*CALL_MARKS, *((THINK, END_OF_THINKING) if self.thinks else ()))

    def before_arguments(self, name: str) -> tuple[str, str]:
        """Returns what stands between a call's beginning and its arguments, around the separator.

        Args:
            name: of the function.
        """
        if self.layout == "plain":
            return name, ""
        return "function", f"{name}\n```json\n"

    @property
    def after_arguments(self) -> str:
        """What stands between a call's arguments and its end."""
        return "" if self.layout == "plain" else "\n```"

    @property
    def between_calls(self) -> str:
        """What stands between two calls."""
        return "" if self.layout == "plain" else "\n"

    def write_calls(self, calls: Iterable[tuple[str, str]]) -> str:
        """Returns calls as a model writes them.

        Args:
            calls: name and arguments of each, the arguments as JSON.
        """
        written = []
        for name, arguments in calls:
            before, after = self.before_arguments(name)
            call = f"{before}{SEPARATOR}{after}{arguments}{self.after_arguments}"
            written.append(f"{CALL_BEGIN}{call}{CALL_END}")
        return f"{CALLS_BEGIN}{self.between_calls.join(written)}{CALLS_END}"


V2 = ChatFormat(marks_are_tokens=False)
V2_5 = ChatFormat()
V3 = R1 = ChatFormat(thinks=True)
V3_1 = ChatFormat(layout="plain", thinks=True)


def chat_format(templates: Iterable[str], tokens: Collection[str]) -> ChatFormat:
    """Returns the format of a model by what its files have, never by its name.

    Args:
        templates: its chat templates.
        tokens: spellings of its tokens that mark something.
    """
    text = "\n".join(templates)
    # V3.1's template writes a name right before the separator; all others write calls in a fence.
    plain = SEPARATOR in text and "```json" not in text
    return ChatFormat(
        layout="plain" if plain else "fenced",
        marks_are_tokens=all(mark in tokens for mark in CALL_MARKS),
        # Some templates only ever take thoughts out of answers.
        thinks=END_OF_THINKING in text and END_OF_THINKING in tokens,
    )
