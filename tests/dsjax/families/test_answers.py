"""Answers taken apart: every way to cut a text gives the same, and that is what was written."""

import json
import random

import pytest

from dsjax.families.answer_parts import Answer, Delta, ToolCall
from dsjax.families.answers import AnswerParser
from dsjax.families.chat_format import (
    CALL_BEGIN,
    CALL_END,
    CALLS_BEGIN,
    CALLS_END,
    END_OF_THINKING,
    R1,
    SEPARATOR,
    V2,
    V2_5,
    V3,
    V3_1,
    ChatFormat,
    chat_format,
)

pytestmark = pytest.mark.core

FAMILIES = {"V2": V2, "V2.5": V2_5, "V3": V3, "R1": R1, "V3.1": V3_1}


def parsed(form: ChatFormat, pieces: list[str], **options) -> tuple[Answer, list[Delta]]:
    names = iter(range(1000))
    parser = AnswerParser(form, new_id=lambda: f"call_{next(names)}", **options)
    deltas = [delta for piece in pieces for delta in parser.feed(piece)] + parser.finish()
    return parser.answer, deltas


def joined(deltas: list[Delta]) -> Answer:
    """What a client makes of the deltas."""
    content = "".join(d.content for d in deltas if d.content is not None)
    reasoning = "".join(d.reasoning_content for d in deltas if d.reasoning_content is not None)
    calls: dict[int, list] = {}
    for delta in deltas:
        kinds = (delta.content, delta.reasoning_content, delta.tool_calls or None)
        assert sum(kind is not None for kind in kinds) == 1
        for piece in delta.tool_calls:
            if piece.index not in calls:
                assert piece.index == len(calls)
                assert piece.id is not None
                assert piece.name is not None
                calls[piece.index] = [piece.id, piece.name, ""]
            else:
                assert piece.id is None
                assert piece.name is None
            calls[piece.index][2] += piece.arguments
    empty = None if calls else ""
    return Answer(content or empty, reasoning or None, tuple(ToolCall(*c) for c in calls.values()))


STRINGS = ["", "a", "{", "}}", '"', "\\", '\\"}', "```", "\n```", f"\n```{CALL_END}", CALL_END]
STRINGS += [
    "é",
    "中文",
    "😀",
    "</think>",
    CALLS_END,
    "<",
    "<｜",
    "json",
    "C:\\Users\\",
    "line\nbreak",
]
TEXTS = [
    "Let me look.",
    "答案 is {",
    "a < b",
    "<｜",
    "```json\n{}\n```",
    "x\n\n",
    " y",
    '"',
    "<thin",
]


def random_value(rng: random.Random, depth: int = 0):
    kind = rng.randrange(7 if depth < 3 else 4)
    if kind == 0:
        return rng.choice([None, True, False, 0, -1.5e-7, 123])
    if kind in (1, 2, 3):
        return "".join(rng.choices(STRINGS, k=rng.randrange(3)))
    if kind == 4:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(3))]
    pairs = (rng.choice(STRINGS) for _ in range(rng.randrange(3)))
    return {key: random_value(rng, depth + 1) for key in pairs}


def random_answer(rng: random.Random, form: ChatFormat) -> tuple[str, dict, Answer]:
    """A text, how its parser is made, and what it means."""
    text, thinking, reasoning = "", False, None
    if form.thinks and rng.random() < 0.6:
        thinking = rng.random() < 0.5
        reasoning = "".join(rng.choices(TEXTS, k=rng.randrange(1, 4))).strip()
        text = ("" if thinking else "<think>") + rng.choice(["", "\n"]) + reasoning
        text += rng.choice(["", "\n"]) + "</think>" + rng.choice(["", "\n\n"])
    thought = bool(text)
    content: str | None = "".join(rng.choices(TEXTS, k=rng.randrange(3)))
    assert content is not None
    content = content.strip() if thought else content
    calls = []
    for index in range(rng.choice([0, 1, 1, 2, 3])):
        arguments = {rng.choice(STRINGS): random_value(rng) for _ in range(rng.randrange(4))}
        calls.append(
            (
                f"call_{index}",
                rng.choice("fg") + "_x",
                json.dumps(
                    arguments, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, None, 2])
                ),
            )
        )
    text += content
    if calls:
        text += rng.choice(["", "\n", "\n\n"]) if content.strip() else ""
        text += form.write_calls([(name, arguments) for _, name, arguments in calls])
        content = content.rstrip() or None
        if rng.random() < 0.3:  # a text after them
            before = text[: text.rindex(CALLS_BEGIN)]
            space = before[len(before.rstrip()) :] if content else ""
            content = (content or "") + space + "Done."
            text += "Done."
    return text, {"thinking": thinking}, _answer(content, reasoning, calls)


def _answer(content, reasoning, calls):
    return Answer(
        content or (None if calls else ""), reasoning or None, tuple(ToolCall(*c) for c in calls)
    )


def pieces_of(rng: random.Random, text: str) -> list[str]:
    """A random cut of a text: into characters, a few pieces, or anything between."""
    count = rng.choice([1, 2, len(text) // 4, len(text)])
    cuts = sorted(rng.randrange(len(text) + 1) for _ in range(count))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_split_gives_what_was_written(name):
    form, rng = FAMILIES[name], random.Random(name)
    cuts = different = 0
    for _ in range(500):
        text, options, expected = random_answer(rng, form)
        whole, deltas = parsed(form, [text], **options)
        assert whole == expected, text
        assert joined(deltas) == whole
        for call in whole.tool_calls:
            json.loads(call.arguments)
        end = rng.randrange(len(text) + 1)
        for part in (text, text[:end]):  # whole, and cut by max_tokens
            unsplit, _ = parsed(form, [part], **options)
            for _ in range(10):
                answer, deltas = parsed(form, pieces_of(rng, part), **options)
                different += answer != unsplit or joined(deltas) != unsplit
                cuts += 1
    assert (cuts, different) == (10_000, 0)


HEAD = f"{CALLS_BEGIN}{CALL_BEGIN}function{SEPARATOR}f\n```json\n"
TAIL = f"\n```{CALL_END}{CALLS_END}"


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (HEAD + "{}" + TAIL, None, [("f", "{}")]),
        (HEAD + TAIL, None, [("f", "{}")]),
        (HEAD + '{"a": 1}' + TAIL, None, [("f", '{"a": 1}')]),
        (HEAD + "  [1, 2]  " + TAIL, None, [("f", "[1, 2]")]),
        (HEAD + '{"a": {"b": "x"}}' + CALL_END, None, [("f", '{"a": {"b": "x"}}')]),
        # A mark or fence that is missing.
        (HEAD.removeprefix(CALLS_BEGIN) + "{}" + TAIL, None, [("f", "{}")]),
        (HEAD.replace(CALL_BEGIN, "") + "{}" + TAIL, None, [("f", "{}")]),
        (HEAD.replace("```json\n", "") + "{}" + TAIL, None, [("f", "{}")]),
        (HEAD.replace("json", "") + "{}" + TAIL, None, [("f", "{}")]),
        (HEAD + "{}" + HEAD + "[]", None, [("f", "{}"), ("f", "[]")]),
        (f"{CALLS_BEGIN}{CALL_BEGIN}function{SEPARATOR}f{CALL_END}", None, [("f", "{}")]),
        (f"{CALLS_BEGIN}{CALL_BEGIN}f{SEPARATOR}{{}}{CALL_END}", None, [("f", "{}")]),
        # Lists without anything, and what is none at all.
        (CALLS_BEGIN + CALLS_END, "", []),
        (f"Hi{CALLS_BEGIN}{CALLS_END} there", "Hi there", []),
        (f"{CALLS_BEGIN}I am not sure.{CALLS_END}", "I am not sure.", []),
        ("Hi \n", "Hi \n", []),
        # A quote that was forgotten costs no other call.
        (HEAD + '{"a": "x}' + TAIL + HEAD + "{}" + TAIL, None, [("f", '{"a": "x}'), ("f", "{}")]),
        # Cut by max_tokens: no half of a name, and no half of a mark.
        (HEAD[: HEAD.index("\n")], "", []),
        (HEAD + '{"a": "x', None, [("f", '{"a": "x')]),
        (HEAD + '{"a": 1}\n``', None, [("f", '{"a": 1}')]),
        (HEAD + '{"a": 1}\n```' + CALL_END[:5], None, [("f", '{"a": 1}')]),
    ],
)
def test_calls_that_others_lose_or_cut(text, content, calls):
    for pieces in ([text], list(text)):
        answer, deltas = parsed(V2_5, pieces)
        assert joined(deltas) == answer
        assert answer.content == content
        assert [(call.name, call.arguments) for call in answer.tool_calls] == calls


def test_a_call_ends_thoughts_that_were_not_ended():
    answer, _ = parsed(R1, ["so I call", HEAD, "{}", TAIL], thinking=True)
    assert answer.reasoning_content == "so I call"
    assert [call.name for call in answer.tool_calls] == ["f"]


def test_thoughts_that_are_cut_are_no_content():
    assert parsed(R1, ["<think>\n", "so ", "I"])[0] == Answer("", "so I")
    assert parsed(R1, ["<think>so I</thi"], thinking=True)[0] == Answer("", "so I</thi")
    assert parsed(R1, ["<thi"])[0] == Answer("<thi")
    assert parsed(V2_5, ["<think>x</think>"])[0] == Answer("<think>x</think>")


def test_no_call_is_made_of_an_answer_that_may_have_none():
    text = HEAD + "{}" + TAIL
    assert parsed(V2_5, list(text), calls=False)[0] == Answer(text)


def test_finish_reason_is_openais():
    parser = AnswerParser(V2_5)
    assert parser.finish_reason("stop") == "stop"
    parser.feed(HEAD + "{")
    assert parser.finish_reason("stop") == "tool_calls"
    assert parser.finish_reason("length") == "length"
    named = AnswerParser(V2_5, named=True)
    named.feed(HEAD)
    assert named.finish_reason("stop") == "stop"


def test_the_format_is_told_by_the_files():
    marks = {CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, SEPARATOR}
    assert chat_format(["{{ 'User: ' }}"], ()) == V2
    fenced = f"{SEPARATOR}' + name + '```json"
    assert chat_format([fenced], marks) == V2_5
    thinking = f"content.split('{END_OF_THINKING}')"
    assert chat_format([fenced + thinking], marks | {END_OF_THINKING}) == R1
    assert chat_format([SEPARATOR + thinking], marks | {END_OF_THINKING}) == V3_1
