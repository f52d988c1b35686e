"""Chat templates: a conversation as the exact text the model was tuned on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox


class ChatTemplate:
    """A compiled Jinja template. It runs in a sandbox, as it may come from anywhere.

    Attributes:
        source: the template's text.
    """

    def __init__(self, source: str, bos_token: str, eos_token: str) -> None:
        self.source = source
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        # The same dialect as transformers: trimmed blocks, break and continue, three names more.
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
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
        try:
            return self._template.render(
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
    if isinstance(source, list):  # several named templates
        named = {entry["name"]: entry["template"] for entry in source}
        source = named.get("default")
    return None if source is None else ChatTemplate(source, bos_token, eos_token)


def _to_json(value: Any, indent: int | None = None) -> str:
    # Jinja's own filter escapes for HTML, which would put \u003c into prompts.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
