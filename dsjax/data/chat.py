"""Chat templates: a conversation as the exact text the model was tuned on."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser

from dsjax.data.template_limits import (
    BUDGET,
    BoundedEnvironment,
    Budget,
    TemplateLimitError,
    weight,
)
from dsjax.files import read_text

ADDITIONAL_TEMPLATES = "additional_chat_templates"


class ChatTemplate:
    """Jinja templates by name, each compiled when it is first rendered.

    They run in a sandbox with limits on time and size, as they may come from anywhere.

    Attributes:
        sources: the templates' texts by name; the usual one is "default".
    """

    def __init__(
        self,
        source: str | Mapping[str, str],
        bos_token: str,
        eos_token: str,
        others: Mapping[str, str] | None = None,
    ) -> None:
        self.sources = {"default": source} if isinstance(source, str) else dict(source)
        self._tokens = {**(others or {}), "bos_token": bos_token, "eos_token": eos_token}
        self._compiled: dict[str, jinja2.Template] = {}

    @functools.cached_property
    def _environment(self) -> BoundedEnvironment:
        # The same dialect as transformers: trimmed blocks, break and continue, three names more.
        environment = BoundedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.limit_filters()
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        return environment

    @functools.cached_property
    def looked_for(self) -> frozenset[str]:
        """The strings that the templates compare with or pass to a call: marks in a content."""
        found = set()
        for source in self.sources.values():
            try:
                tree = self._environment.parse(source)
            except jinja2.TemplateError:
                continue
            for node in tree.find_all((jinja2.nodes.Compare, jinja2.nodes.Call)):
                consts = node.find_all(jinja2.nodes.Const)
                found |= {const.value for const in consts if isinstance(const.value, str)}
        return frozenset(found)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        name: str | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """Returns the text of a conversation.

        Args:
            messages: dicts with "role" and "content".
            tools: JSON schemas of functions the model may call.
            add_generation_prompt: whether the text ends where the assistant's answer begins.
            name: of the template; None takes "tool_use" where there are tools and such a
                template, else "default".
            arguments: what else the template reads, as V3.1's `thinking`.

        Returns:
            The prompt, special tokens written out.

        Raises:
            ValueError: when there is no such template, the template refuses the messages, one
                lacks a field it reads, or it runs for seconds or writes without end.
        """
        if name is None:
            name = "tool_use" if tools is not None and "tool_use" in self.sources else "default"
        if name not in self.sources:
            there = ", ".join(sorted(self.sources))
            raise ValueError(f"chat_template: there is no template {name!r}, only {there}")
        # What a list of messages is made of decides how much may be made of it.
        reserved = {"messages", "tools", "add_generation_prompt"} & {*(arguments or ())}
        if reserved:
            raise ValueError(f"chat_template: {min(reserved)} is no argument of its own")
        size = weight([messages, tools], 1 << 32) + len(self.sources[name])
        token = BUDGET.set(Budget(size))
        try:
            if name not in self._compiled:
                # Now: a template that we cannot read is no reason not to load text.
                try:
                    self._compiled[name] = self._environment.from_string(self.sources[name])
                except (jinja2.TemplateError, RecursionError) as error:
                    raise ValueError(f"chat_template: {_one_line(error)}") from None
            return self._compiled[name].render(
                **{k: v for k, v in (arguments or {}).items() if k not in self._tokens},
                messages=messages,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                **self._tokens,
            )
        except TemplateLimitError as error:
            raise ValueError(f"the chat template is stopped: {_one_line(error)}") from None
        except (jinja2.TemplateError, *_FAULTS) as error:
            if isinstance(error, ValueError) and str(error).startswith("chat_template: "):
                raise
            raise ValueError(f"messages do not fit the chat template: {_one_line(error)}") from None
        finally:
            BUDGET.reset(token)


# What an expression can raise that a template gets wrong.
_FAULTS = (
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RecursionError,
    MemoryError,
)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def read_chat_template(
    folder: Path, config: Mapping[str, Any], bos_token: str, eos_token: str
) -> ChatTemplate | None:
    """Reads the templates beside a tokenizer, as transformers does.

    `chat_template.jinja` and `additional_chat_templates/NAME.jinja` come before the field
    `chat_template` of the tokenizer's config: a text, an object of names, or a list of objects
    with "name" and "template".

    Args:
        folder: where the tokenizer lies.
        config: its `tokenizer_config.json`.
        bos_token: text of BOS.
        eos_token: text of EOS.

    Returns:
        The templates, or None when there is none.

    Raises:
        ValueError: the field is none of these; names the file.
    """
    file = folder / "chat_template.jinja"
    sources = {"default": read_text(file)} if file.is_file() else {}
    for more in sorted((folder / ADDITIONAL_TEMPLATES).glob("*.jinja")):
        sources[more.stem] = read_text(more)
    sources = sources or _named(config.get("chat_template"), folder)
    if not sources:
        return None
    others = {}
    for name in ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token"):
        token = config.get(name)
        token = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(token, str):
            others[name] = token
    return ChatTemplate(sources, bos_token, eos_token, others)


def _named(given: Any, folder: Path) -> dict[str, str]:
    """Returns the templates of a tokenizer's config by name."""
    if given is None:
        return {}
    named = {"default": given} if isinstance(given, str) else given
    if isinstance(named, list) and all(
        isinstance(entry, Mapping) and {"name", "template"} <= entry.keys() for entry in named
    ):
        named = {entry["name"]: entry["template"] for entry in named}
    if not isinstance(named, Mapping) or not all(
        isinstance(text, str) for text in (*named, *named.values())
    ):
        raise ValueError(
            f"{folder / 'tokenizer_config.json'}: chat_template must be a text, an object of "
            "texts, or a list of objects with name and template"
        )
    return dict(named)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`: marks what the assistant says, for training masks; renders as it is."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        block = jinja2.nodes.CallBlock(self.call_method("_same"), [], [], body)
        return block.set_lineno(lineno)

    def _same(self, caller: Any) -> str:
        return str(caller())


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML, which would put \u003c into prompts.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
