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
import jinja2.sandbox


class ChatTemplate:
    """A Jinja template, compiled when it is first rendered.

    It runs in a sandbox, as it may come from anywhere.

    Attributes:
        source: the template's text.
    """

    def __init__(
        self,
        source: str,
        bos_token: str,
        eos_token: str,
        others: Mapping[str, str] | None = None,
    ) -> None:
        self.source = source
        self._tokens = {**(others or {}), "bos_token": bos_token, "eos_token": eos_token}

    @functools.cached_property
    def _template(self) -> jinja2.Template:
        # When it is first needed: a template that we cannot read is no reason not to load text.
        # The same dialect as transformers: trimmed blocks, break and continue, three names more.
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            return environment.from_string(self.source)
        except jinja2.TemplateError as error:
            raise ValueError(f"chat_template: {error}") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """Returns the text of a conversation.

        Args:
            messages: dicts with "role" and "content".
            tools: JSON schemas of functions the model may call.
            add_generation_prompt: whether the text ends where the assistant's answer begins.

        Returns:
            The prompt, special tokens written out.

        Raises:
            ValueError: when the template refuses the messages or one lacks a field it reads.
        """
        template = self._template
        try:
            return template.render(
                messages=messages,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                **self._tokens,
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"messages do not fit the chat template: {error}") from None


def read_chat_template(
    folder: Path, config: Mapping[str, Any], bos_token: str, eos_token: str
) -> ChatTemplate | None:
    """Reads the template beside a tokenizer: `chat_template.jinja`, or a field of its config.

    Args:
        folder: where the tokenizer lies.
        config: its `tokenizer_config.json`.
        bos_token: text of BOS.
        eos_token: text of EOS.

    Returns:
        The template, or None when there is none.
    """
    file = folder / "chat_template.jinja"
    source = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
    if isinstance(source, Mapping):
        source = source.get("default")
    if isinstance(source, list):  # several named templates
        named = {entry["name"]: entry["template"] for entry in source}
        source = named.get("default")
    if source is None:
        return None
    others = {}
    for name in ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token"):
        token = config.get(name)
        token = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(token, str):
            others[name] = token
    return ChatTemplate(source, bos_token, eos_token, others)


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
