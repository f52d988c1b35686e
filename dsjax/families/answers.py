"""An answer taken apart while it is streamed: thoughts, text and calls of functions.

One small state machine over characters. What it gives depends on the text alone, not on how the
text was cut into pieces: what could still become a mark is held back until it is one or not.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field

from dsjax.families.answer_parts import Answer, Delta, ToolCall, ToolCallDelta, joined
from dsjax.families.chat_format import (
    CALL_BEGIN,
    CALL_END,
    CALLS_BEGIN,
    CALLS_END,
    END_OF_THINKING,
    SEPARATOR,
    THINK,
    ChatFormat,
)

_FENCE = "```"
_ENDS_OF_CALL = (CALL_END, CALLS_END, CALL_BEGIN, CALLS_BEGIN)
# A longer run of white space in a string is no end of a fence.
_MAX_SPACE = 64
_IN_STRING = re.compile(r'[^"\\\n]+')
_OUTSIDE = re.compile(r'[^"`<\s]+')
_SPACE = re.compile(r"\s+")


@dataclass
class _Call:
    id: str
    name: str
    arguments: list[str] = field(default_factory=list)


def new_call_id() -> str:
    """Returns an id that no other call has."""
    return f"call_{secrets.token_hex(12)}"


class AnswerParser:
    """Takes one answer apart, piece by piece; `feed` each, then `finish`."""

    def __init__(
        self,
        form: ChatFormat,
        *,
        calls: bool = True,
        thinking: bool = False,
        named: bool = False,
        new_id: Callable[[], str] = new_call_id,
    ) -> None:
        """Begins an answer.

        Args:
            form: of the model's family.
            calls: whether functions may be called; if not, marks of calls are text.
            thinking: whether the prompt ends in `<think>`, so that the answer begins inside.
            named: whether the caller named the function to call, which makes "stop" of
                `finish_reason`.
            new_id: names calls.
        """
        self._form = form
        self._calls_wanted = calls
        self._thinking = thinking
        self._named = named
        self._new_id = new_id
        self._state: Callable[[], bool] = self._start if form.thinks else self._text
        # Whether text is thoughts, and whether white space before the next text is dropped.
        self._reasons = self._strips = form.thinks and thinking
        self._buffer = ""
        self._space = ""  # held until it is known whether a mark follows
        self._json_space = ""  # likewise, in arguments
        self._header = ""
        self._in_string = self._escaped = self._begun = False
        self._deltas: list[Delta] = []
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[_Call] = []

    @property
    def answer(self) -> Answer:
        """All that became certain so far."""
        content, reasoning = "".join(self._content), "".join(self._reasoning)
        return Answer(
            content or (None if self._calls else ""),
            reasoning or None,
            tuple(ToolCall(c.id, c.name, "".join(c.arguments)) for c in self._calls),
        )

    def finish_reason(self, finish: str) -> str:
        """Returns OpenAI's reason: "tool_calls" for a "stop" that came after calls.

        Where the caller named the function, theirs says "stop".
        """
        return "tool_calls" if finish == "stop" and self._calls and not self._named else finish

    def feed(self, text: str) -> list[Delta]:
        """Takes more text and returns what became certain."""
        self._buffer += text
        while self._buffer and self._state():
            pass
        return self._take()

    def finish(self) -> list[Delta]:
        """Ends the answer, which may be cut anywhere, and returns what was held back."""
        held, self._buffer = self._buffer, ""
        if self._state == self._arguments:
            # Outside of a string it is the beginning of a mark or fence.
            if self._in_string:
                self._add_arguments(held)
        elif self._state in (self._start, self._text, self._thoughts):
            self._say(held)
            if self._space and not (self._calls and not self._reasons):
                self._put(self._space)
        # A name that was cut is no name; it is dropped with the marks around it.
        return self._take()

    # What is given out

    def _take(self) -> list[Delta]:
        deltas, self._deltas = self._deltas, []
        return joined(deltas)

    def _put(self, text: str) -> None:
        if not text:
            return
        if self._reasons:
            self._reasoning.append(text)
            self._deltas.append(Delta(reasoning_content=text))
        else:
            self._content.append(text)
            self._deltas.append(Delta(content=text))

    def _say(self, text: str) -> None:
        """Gives out text; white space at its end waits for what follows."""
        bare = text.rstrip()
        if bare:
            self._put(bare.lstrip() if self._strips else self._space + bare)
            self._space, self._strips = "", False
        if not self._strips:
            self._space += text[len(text.rstrip()) :]

    def _begin_call(self, name: str) -> None:
        call = _Call(self._new_id(), name)
        piece = ToolCallDelta(len(self._calls), call.id, name)
        self._calls.append(call)
        self._deltas.append(Delta(tool_calls=(piece,)))
        self._in_string = self._escaped = self._begun = False
        self._json_space = ""

    def _add_arguments(self, text: str) -> None:
        if text:
            self._begun = True
            self._calls[-1].arguments.append(text)
            piece = ToolCallDelta(len(self._calls) - 1, arguments=text)
            self._deltas.append(Delta(tool_calls=(piece,)))

    # The states. Each takes something off the buffer and returns True, or needs more of it.

    def _start(self) -> bool:
        """Where thoughts may begin."""
        bare = self._buffer.lstrip()
        if _may_become(bare, (THINK,)):
            return False
        if bare.startswith(THINK):
            self._buffer = bare[len(THINK) :]
            self._thinking = True
        self._reasons = self._strips = self._thinking
        self._state = self._thoughts if self._thinking else self._text
        return True

    def _thoughts(self) -> bool:
        marks = (END_OF_THINKING, CALLS_BEGIN) if self._calls_wanted else (END_OF_THINKING,)
        found = self._until(marks)
        if found is None:
            return False
        self._reasons, self._space = False, ""
        self._strips = True
        self._state = self._text if found == END_OF_THINKING else self._between
        return True

    def _text(self) -> bool:
        if not self._calls_wanted:
            self._say(self._buffer)
            self._buffer = ""
            return False
        found = self._until((CALLS_BEGIN, CALL_BEGIN))
        if found is None:
            return False
        self._header = ""
        self._state = self._between if found == CALLS_BEGIN else self._type
        return True

    def _until(self, marks: tuple[str, ...]) -> str | None:
        """Gives out text up to the first of some marks, takes that and returns it."""
        at, mark = _first(self._buffer, marks)
        end = at if mark else len(self._buffer) - _held_for(self._buffer, marks)
        self._say(self._buffer[:end])
        self._buffer = self._buffer[end + len(mark) :]
        return mark or None

    def _between(self) -> bool:
        """Between calls: marks and white space; other text is a call that lacks its mark."""
        bare = self._buffer.lstrip()
        marks = (CALLS_END, CALL_BEGIN, CALL_END, CALLS_BEGIN)
        self._buffer = bare
        if _may_become(bare, marks):
            return False
        mark = next((mark for mark in marks if bare.startswith(mark)), "")
        self._buffer = bare[len(mark) :]
        self._header = ""
        if mark == CALLS_END:
            self._state = self._text
        elif mark in ("", CALL_BEGIN):
            self._state = self._type
        return True

    def _type(self) -> bool:
        """What stands before the separator: "function", or the name."""
        ends = (SEPARATOR, *_ENDS_OF_CALL)
        at, mark = _first(self._buffer, ends)
        if not mark:
            end = len(self._buffer) - _held_for(self._buffer, ends)
            self._header += self._buffer[:end]
            self._buffer = self._buffer[end:]
            return False
        self._header += self._buffer[:at]
        if mark == SEPARATOR:
            self._buffer = self._buffer[at + len(mark) :]
            self._state = self._name
            return True
        # No call after all: what was said stays said.
        self._buffer = self._buffer[at:]
        self._say(self._header)
        self._state = self._between
        return True

    def _name(self) -> bool:
        """The name in a line of its own, or arguments where it stood before the separator."""
        bare = self._buffer.lstrip()
        if not bare:
            return False
        if bare[0] in '{["':
            self._begin_call(self._header.strip())
            self._buffer = bare
            self._state = self._arguments
            return True
        ends = ("\n", _FENCE, "{", *_ENDS_OF_CALL)
        at, _ = _first(bare, ends)
        if at == len(bare):
            return False
        # Without a name in the line it stood before the separator, and a fence follows.
        self._begin_call(bare[:at].strip() or self._header.strip())
        self._buffer = bare[at:]
        self._state = self._fence
        return True

    def _fence(self) -> bool:
        bare = self._buffer.lstrip()
        opening = f"{_FENCE}json"
        if _may_become(bare, (opening,)):
            return False
        for start in (opening, _FENCE):
            if bare.startswith(start):
                bare = bare[len(start) :]
                break
        self._buffer = bare
        self._state = self._arguments
        return True

    def _arguments(self) -> bool:
        return self._inside_string() if self._in_string else self._outside_string()

    def _inside_string(self) -> bool:
        text = self._buffer
        if self._escaped:
            self._escaped = False
            return self._pass(1)
        if found := _IN_STRING.match(text):
            return self._pass(found.end())
        if text[0] == "\n":
            # JSON has no such line break; where the fence ends after it, a quote was forgotten.
            decided = _ends_fence(text)
            if decided is None:
                return False
            return self._end_call() if decided else self._pass(1)
        self._in_string = text[0] != '"'
        self._escaped = text[0] == "\\"
        return self._pass(1)

    def _outside_string(self) -> bool:
        text = self._buffer
        if found := _SPACE.match(text):
            # White space at either end is none of the arguments.
            self._json_space += found[0] if self._begun else ""
            self._buffer = text[found.end() :]
            return True
        ends = (_FENCE, *_ENDS_OF_CALL)
        if _may_become(text, ends):
            return False
        if text.startswith(ends):
            return self._end_call()
        self._add_arguments(self._json_space)
        self._json_space = ""
        if found := _OUTSIDE.match(text):
            return self._pass(found.end())
        self._in_string = text[0] == '"'
        return self._pass(1)

    def _pass(self, size: int) -> bool:
        self._add_arguments(self._buffer[:size])
        self._buffer = self._buffer[size:]
        return True

    def _end_call(self) -> bool:
        if not self._begun:
            self._add_arguments("{}")  # what is no JSON would stop a client
        self._buffer = self._buffer.lstrip().removeprefix(_FENCE)
        self._state = self._between
        return True


def _first(text: str, marks: tuple[str, ...]) -> tuple[int, str]:
    """Returns where the first of some marks is and which; the text's length and "" without one."""
    found = [(at, mark) for mark in marks if (at := text.find(mark)) >= 0]
    return min(found, default=(len(text), ""))


def _may_become(text: str, marks: tuple[str, ...]) -> bool:
    """Whether more text is needed to know if a text starts with one of some marks."""
    return any(len(text) < len(mark) and mark.startswith(text) for mark in marks)


def _held_for(text: str, marks: tuple[str, ...]) -> int:
    """Returns the length of the longest end that could begin one of some marks."""
    longest = min(max(map(len, marks)) - 1, len(text))
    for size in range(longest, 0, -1):
        if any(mark.startswith(text[-size:]) for mark in marks):
            return size
    return 0


def _ends_fence(text: str) -> bool | None:
    """Whether a line break ends a fence and its call; None where more text is needed."""
    for part in (_FENCE, CALL_END):
        bare = text.lstrip()
        if len(text) - len(bare) > _MAX_SPACE:
            return False
        if not bare.startswith(part):
            return None if _may_become(bare, (part,)) else False
        text = bare[len(part) :]
    return True
