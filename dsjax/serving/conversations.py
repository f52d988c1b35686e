"""What a caller asks of a chat, made into a prompt, a grammar and a parser."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsjax.data.tokenizer import Tokenizer
from dsjax.engine.request import TokenMask
from dsjax.families.answers import AnswerParser
from dsjax.families.chat_format import (
    CALL_BEGIN,
    CALL_END,
    CALLS_BEGIN,
    CALLS_END,
    END_OF_THINKING,
    SEPARATOR,
    THINK,
    chat_format,
)
from dsjax.families.messages import (
    TemplateReads,
    prepare_messages,
    response_text,
    template_reads,
    tools_text,
)
from dsjax.serving.grammars import FixedMask, Grammars, json_rule, lark_string
from dsjax.serving.schemas import check_schema

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_MAX_TOOLS, _MAX_CALLS = 128, 32
_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class Prepared:
    """A conversation that is ready to be answered.

    Attributes:
        prompt: token ids, BOS included.
        show_tokens: for `Sampling.show_tokens`: marks that the answer's text must spell.
        mask: returns a new mask, for one request; or None.
        parser: returns a new parser, for one answer.
    """

    prompt: tuple[int, ...]
    show_tokens: tuple[int, ...]
    mask: Callable[[], TokenMask | None]
    parser: Callable[[], AnswerParser]


@dataclass(frozen=True)
class _Tools:
    """The functions that may be called, and how often.

    Attributes:
        functions: all that are shown.
        allowed: those that may be called.
        mode: "none", "auto" or "required".
        named: whether the caller named the one.
        most: calls at most.
    """

    functions: tuple[Mapping[str, Any], ...]
    allowed: tuple[Mapping[str, Any], ...]
    mode: str
    named: bool
    most: int


class Conversations:
    """Makes requests of conversations for one model."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        end_ids: Iterable[int] | None = None,
        mask_threads: int | None = None,
    ) -> None:
        """Looks at the tokenizer's templates; grammars are made ready when first needed.

        Args:
            tokenizer: of the model.
            vocab_size: of the model.
            end_ids: tokens that end an answer; None takes the tokenizer's EOS.
            mask_threads: that compute masks; None takes four fifths of the cores.
        """
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._grammar_options = (tokenizer, vocab_size, end_ids, mask_threads)
        template = tokenizer.chat_template
        sources = () if template is None else tuple(template.sources.values())
        self.form = chat_format(sources, tokenizer.marker_ids)
        self._reads: dict[Any, TemplateReads] = {}
        self._made: Grammars | None = None
        self._lock = threading.Lock()

    @property
    def grammars(self) -> Grammars:
        """The grammars of the model's vocabulary."""
        with self._lock:
            if self._made is None:
                self._made = Grammars(*self._grammar_options)
            return self._made

    def prepare(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        parallel_tool_calls: bool | None = True,
        response_format: Mapping[str, Any] | None = None,
        regex: str | None = None,
        template: str | None = None,
        template_arguments: Mapping[str, Any] | None = None,
    ) -> Prepared:
        """Makes a prompt, a grammar and a parser of a conversation; all as OpenAI's API has them.

        Args:
            messages: of the conversation.
            tools: functions that the model may call.
            tool_choice: "none", "auto", "required", a function or allowed tools; None is "auto".
            parallel_tool_calls: whether an answer may have several calls.
            response_format: of type "text", "json_object" or "json_schema".
            regex: what an answer must match, beside OpenAI's API.
            template: the name of one of several chat templates.
            template_arguments: what else the template reads, as V3.1's `thinking`.

        Raises:
            ValueError: begins with the field that is to blame.
        """
        asked = _tools(tools, tool_choice, parallel_tool_calls)
        constraint = self._answer_rule(response_format, regex)
        if constraint is not None and asked is not None and asked.mode == "required":
            raise ValueError("tool_choice: an answer cannot be both a call and a response_format")
        name = template
        if name is None and tools and self._has_template("tool_use"):
            name = "tool_use"
        reads = self._template_reads(name, template_arguments)
        gained = []
        if asked is not None and not reads.tools:
            gained.append(tools_text(asked.functions, self.form))
        kind = (response_format or {}).get("type")
        if kind in ("json_object", "json_schema"):
            schema = None if kind == "json_object" else _schema(response_format)
            gained.append(response_text(schema))
        ready = prepare_messages(messages, reads, self.form, "\n\n".join(gained) or None)
        prompt = self._tokenizer.encode_chat(
            ready,
            list(tools) if tools and reads.tools else None,
            template=name,
            arguments=template_arguments,
        )
        thinking = self.form.thinks and self._opens_thoughts(prompt)
        mask = self._mask(asked, constraint, thinking)
        mask()  # what is wrong with a grammar is said now
        calls = asked is not None and asked.mode != "none"
        named = asked is not None and asked.named
        marks = self._tokenizer.marker_ids
        shown = (marks[text] for text in self.form.marks if text in marks)
        return Prepared(
            tuple(prompt),
            tuple(token for token in shown if token in self._tokenizer.special_ids),
            mask,
            lambda: AnswerParser(self.form, calls=calls, thinking=thinking, named=named),
        )

    def mask(
        self, *, response_format: Mapping[str, Any] | None = None, regex: str | None = None
    ) -> TokenMask | None:
        """Returns a mask for a text that is no chat, or None where nothing is asked of it.

        Raises:
            ValueError: begins with the field that is to blame.
        """
        rule = self._answer_rule(response_format, regex)
        return None if rule is None else self.grammars.lark(f"start: {rule[0]}", rule[1])

    def _has_template(self, name: str) -> bool:
        template = self._tokenizer.chat_template
        return template is not None and name in template.sources

    def _template_reads(
        self, name: str | None, arguments: Mapping[str, Any] | None
    ) -> TemplateReads:
        key = (name, repr(sorted((arguments or {}).items())))
        if key not in self._reads:

            def render(messages: list[dict[str, Any]], tools: list[Any] | None) -> str:
                return self._tokenizer.apply_chat_template(
                    messages, tools, False, name, arguments=arguments
                )

            if len(self._reads) > 64:
                self._reads.clear()
            self._reads[key] = template_reads(render)
        return self._reads[key]

    def _opens_thoughts(self, prompt: Sequence[int]) -> bool:
        mark = self._tokenizer.marker_ids.get(THINK)
        end = list(prompt[-4:])
        if mark is None or mark not in end:
            return False
        after = end[len(end) - end[::-1].index(mark) :]
        return not self._tokenizer.decode(after).strip()

    def _answer_rule(
        self, response_format: Mapping[str, Any] | None, regex: str | None
    ) -> tuple[str, str] | None:
        """Returns the grammar's rule for what is said, and the field that asked for it."""
        kind = "text"
        if response_format is not None:
            if not isinstance(response_format, Mapping):
                raise ValueError("response_format: must be an object")
            kind = response_format.get("type", "")
            if kind not in ("text", "json_object", "json_schema"):
                raise ValueError(
                    f"response_format.type: {kind!r} must be text, json_object or json_schema"
                )
        if regex is not None:
            if kind != "text":
                raise ValueError("regex: cannot be given beside response_format")
            self.grammars.regex(regex)  # says what is wrong with it in its own words
            return _lark_regex(regex), "regex"
        if kind == "json_object":
            return json_rule({"type": "object"}), "response_format"
        if kind == "json_schema":
            schema, field = _schema(response_format), "response_format.json_schema.schema"
            check_schema(schema, field)
            self.grammars.json_schema(schema, field)
            return json_rule(schema), field
        return None

    def _mask(
        self, tools: _Tools | None, answer: tuple[str, str] | None, thinking: bool
    ) -> Callable[[], TokenMask | None]:
        forced = tools is not None and tools.mode == "required"
        strict = tools is not None and tools.mode == "auto"
        strict = (
            strict
            and tools is not None
            and (tools.most == 1 or any(f.get("strict") for f in tools.allowed))
        )
        if answer is None and not forced and not strict:
            if tools is None or tools.mode != "none" or not self.form.marks_are_tokens:
                return lambda: None
            banned = [self._tokenizer.marker_ids[mark] for mark in (CALLS_BEGIN, CALL_BEGIN)]
            return lambda: FixedMask(self._vocab_size, banned)
        rules, field = [], "tools"
        if tools is not None and tools.mode != "none":
            rules += self._call_rules(tools)
        body = "calls"
        if answer is not None:
            # Where calls are free, an answer is a call or what was asked for.
            body = "answer | calls" if tools is not None and tools.mode == "auto" else "answer"
            rules.append(f"answer: {answer[0]}")
            field = answer[1]
        elif strict and self.form.marks_are_tokens:
            body = "TEXT calls?"
        elif strict:
            body = "PLAIN_TEXT | before_calls calls_after"
            rules.append(f"before_calls[lazy]: /(.|\\n)*{CALLS_BEGIN}/")
            rules.append(f"PLAIN_TEXT: /(.|\\n)*/ & ~/(.|\\n)*{CALLS_BEGIN[:6]}(.|\\n)*/")
        think, end = (self._mark(mark) for mark in (THINK, END_OF_THINKING))
        start = f"({body})"
        if thinking:
            start = f"TEXT {end} SPACE {start}"
        elif self.form.thinks:
            start = f"({think} TEXT {end} SPACE)? {start}"
        rules += ["TEXT: /(.|\\n)*/", "SPACE: /\\n{0,2}/"]
        grammar = "\n".join([f"start: {start}", *rules])
        return lambda: self.grammars.lark(grammar, field)

    def _mark(self, text: str) -> str:
        token = self._tokenizer.marker_ids.get(text)
        return lark_string(text) if token is None else f"<[{token}]>"

    def _call_rules(self, tools: _Tools) -> list[str]:
        form, mark = self.form, self._mark
        between = lark_string(form.between_calls) if form.between_calls else ""
        more = f"({between} call){{0,{tools.most - 1}}}" if tools.most > 1 else ""
        after = lark_string(form.after_arguments) if form.after_arguments else ""
        rules = [
            f"calls: {mark(CALLS_BEGIN)} calls_after",
            f"calls_after: call {more} {mark(CALLS_END)}",
            "call: " + " | ".join(f"call_{i}" for i in range(len(tools.allowed))),
        ]
        for index, function in enumerate(tools.allowed):
            before, line = form.before_arguments(function["name"])
            line = lark_string(line) if line else ""
            rules += [
                f"call_{index}: {mark(CALL_BEGIN)} {lark_string(before)} {mark(SEPARATOR)} {line} "
                f"arguments_{index} {after} {mark(CALL_END)}",
                f"arguments_{index}: {json_rule(_parameters(function))}",
            ]
            # A schema that cannot be met is to blame by its own field.
            field = f"tools.{function['name']}.parameters"
            self.grammars.json_schema(_parameters(function), field)
        return rules


def _lark_regex(pattern: str) -> str:
    from llguidance import regex_to_lark

    return f"/{regex_to_lark(pattern, '')}/"


def _schema(response_format: Any) -> Any:
    given = response_format.get("json_schema")
    if not isinstance(given, Mapping):
        raise ValueError("response_format.json_schema: is missing")
    return given.get("schema", {"type": "object"})


def _parameters(function: Mapping[str, Any]) -> Mapping[str, Any]:
    parameters = function.get("parameters")
    return parameters or _NO_ARGUMENTS


def _tools(tools: Any, choice: Any, parallel: bool | None) -> _Tools | None:
    if not tools:
        if choice not in (None, "none", "auto"):
            raise ValueError("tool_choice: needs tools")
        return None
    if not isinstance(tools, Sequence) or isinstance(tools, str) or len(tools) > _MAX_TOOLS:
        raise ValueError(f"tools: must be a list of {_MAX_TOOLS} at most")
    functions: dict[str, Mapping[str, Any]] = {}
    for index, tool in enumerate(tools):
        function = _function(tool, f"tools[{index}]")
        if function["name"] in functions:
            raise ValueError(f"tools[{index}].function.name: {function['name']!r} is there twice")
        functions[function["name"]] = function
    mode, names, named = _choice(choice, functions)
    most = _MAX_CALLS if parallel in (None, True) and not named else 1
    shown = tuple(functions.values())
    return _Tools(shown, tuple(functions[name] for name in names), mode, named, most)


def _function(tool: Any, field: str) -> Mapping[str, Any]:
    if not isinstance(tool, Mapping) or tool.get("type") != "function":
        raise ValueError(f"{field}.type: must be function")
    function = tool.get("function")
    if not isinstance(function, Mapping):
        raise ValueError(f"{field}.function: is missing")
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"{field}.function.name: {name!r} must be 1 to 64 letters, digits, dots, _ or -"
        )
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise ValueError(f"{field}.function.parameters: must be an object")
    if parameters:
        check_schema(parameters, f"{field}.function.parameters")
    return function


def _choice(choice: Any, functions: Mapping[str, Any]) -> tuple[str, list[str], bool]:
    """Returns the mode, the functions that may be called, and whether one was named."""
    if choice is None or (isinstance(choice, str) and choice in ("none", "auto", "required")):
        return choice or "auto", [*functions], False
    kind = choice.get("type") if isinstance(choice, Mapping) else None
    if kind == "function":
        name = _named(choice, functions, "tool_choice")
        return "required", [name], True
    if kind == "allowed_tools":
        given = choice.get("allowed_tools")
        given = given if isinstance(given, Mapping) else choice
        mode, tools = given.get("mode", "auto"), given.get("tools")
        if mode not in ("auto", "required") or not isinstance(tools, Sequence) or not tools:
            raise ValueError("tool_choice.allowed_tools: must have a mode and tools")
        field = "tool_choice.allowed_tools.tools"
        return mode, [_named(tool, functions, field) for tool in tools], False
    raise ValueError(
        f"tool_choice: {choice!r} must be none, auto, required, a function or allowed_tools"
    )


def _named(choice: Any, functions: Mapping[str, Any], field: str) -> str:
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if name not in functions:
        raise ValueError(f"{field}: there is no function {name!r} in tools")
    return str(name)
