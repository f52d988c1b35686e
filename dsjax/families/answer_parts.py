"""The parts of an answer: text, thoughts, calls; whole, and in the pieces that are streamed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class ToolCallDelta:
    """A piece of a call.

    Attributes:
        index: of the call in the answer.
        id: in the first piece of a call only, as its name.
        name: of the function.
        arguments: what comes next of their JSON.
    """

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True)
class Delta:
    """What became certain; exactly one of the three."""

    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: tuple[ToolCallDelta, ...] = ()


@dataclass(frozen=True)
class ToolCall:
    """A call: the function's name, and its arguments as the model wrote them."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Answer:
    """An answer in its parts; None where there is no such part.

    Attributes:
        content: what is said.
        reasoning_content: what was thought before.
        tool_calls: the functions that are to be called.
        finish_reason: as OpenAI's API has it, once it is known.
    """

    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    finish_reason: str | None = None


def joined(deltas: Iterable[Delta]) -> list[Delta]:
    """Returns deltas with neighbours of one kind, and of one call, made one."""
    found: list[Delta] = []
    for delta in deltas:
        last = found[-1] if found else Delta()
        if delta.content is not None and last.content is not None:
            found[-1] = Delta(content=last.content + delta.content)
        elif delta.reasoning_content is not None and last.reasoning_content is not None:
            text = last.reasoning_content + delta.reasoning_content
            found[-1] = Delta(reasoning_content=text)
        elif (
            delta.tool_calls
            and last.tool_calls
            and delta.tool_calls[0].index == last.tool_calls[0].index
        ):
            piece = last.tool_calls[0]
            more = piece.arguments + delta.tool_calls[0].arguments
            found[-1] = Delta(tool_calls=(replace(piece, arguments=more),))
        else:
            found.append(delta)
    return found
