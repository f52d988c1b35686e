"""Chat templates: the dialect of transformers, and an end to those that would have none."""

import time
import tracemalloc

import pytest

from dsjax.data.chat import ChatTemplate, read_chat_template
from dsjax.weights.assets import small_files

pytestmark = pytest.mark.core

MESSAGES = [{"role": "user", "content": "é"}]


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{{ messages | tojson(sort_keys=true, separators=(',', ':')) }}",
        "{{ messages | tojson(true) }}",
        "{{ messages | tojson(ensure_ascii=true, indent=2) }}",
        "{{ pad_token }}{{ bos_token }}",
    ],
)
def test_renders_as_transformers_does(source, tmp_path):
    rendering = pytest.importorskip("transformers.utils.chat_template_utils")
    (expected,), _ = rendering.render_jinja_template(
        [MESSAGES],
        chat_template=source,
        add_generation_prompt=True,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )
    for form in (source, {"default": source}, [{"name": "default", "template": source}]):
        config = {"chat_template": form, "pad_token": {"content": "<pad>"}}
        template = read_chat_template(tmp_path, config, "<s>", "</s>")
        assert template is not None
        assert template.render(MESSAGES) == expected


def test_a_template_is_compiled_when_it_is_needed():
    template = ChatTemplate("{% if %}", "<s>", "</s>")
    with pytest.raises(ValueError, match=r"^chat_template: "):
        template.render(MESSAGES)


def grown(start: str, step: str) -> str:
    """A template that makes a value of itself, ninety-nine times, and writes it."""
    loop = f"{{% for i in range(99) %}}{{% set n.x = {step} %}}{{% endfor %}}"
    return f"{{% set n = namespace(x={start}) %}}{loop}{{{{ n.x }}}}"


RUNAWAYS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops_that_write": "{% for i in range(99999) %}"
    "{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "data": "{% for i in range(99999) %}" + "x" * 9999 + "{% endfor %}",
    "range": "{% for i in range(10**12) %}{% endfor %}",
    "product": "{{ 'x' * 10**10 }}",
    "product_of_lists": "{{ ([0] * 10**10) | length }}",
    "power": "{{ (9 ** (9 ** 9)) % 2 }}",
    "squares": grown("9", "n.x * n.x"),
    "doubled": grown("'x'", "n.x + n.x"),
    "tilde": grown("'x'", "n.x ~ n.x"),
    "set_block": "{% set n = namespace(x='x') %}{% for i in range(99) %}"
    "{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}{% endfor %}",
    "lists": grown("1", "[n.x, n.x]"),
    "dicts": grown("1", "dict(a=n.x, b=n.x)"),
    "macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "macro_twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(99) }}",
    "block": "{% block a %}{{ self.a() }}{% endblock %}",
    "recursive_loop": "{% for x in [[1]] recursive %}{{ loop([[1], [1]]) }}{% endfor %}",
    "center": "{{ 'x' | center(10**10) }}",
    "center_constant": "{{ 'x' | center(10000000000) }}",
    "ljust": "{{ 'x'.ljust(10**10) }}",
    "zfill": "{{ 'x'.zfill(10**10) }}",
    "expandtabs": "{{ '\\t'.expandtabs(10**9) }}",
    "replace": "{% set x = 'x' * 99999 %}{{ x | replace('x', x) }}",
    "replace_method": "{% set x = 'x' * 99999 %}{{ x.replace('', x) }}",
    "join": "{% set x = 'x' * 99999 %}{{ ([x] * 99999) | join(x) }}",
    "join_method": "{% set x = 'x' * 99999 %}{{ x.join([x] * 99999) }}",
    "join_map": "{{ range(99999) | map('center', 99999) | join }}",
    "list_map": "{{ range(99999) | map('center', 99999) | list | length }}",
    "batch": "{{ [1] | batch(10**10, 1) | list }}",
    "batch_map": "{{ ([[1]] * 9999) | map('batch', 99999, 1) | map('list') | list | length }}",
    "indent": "{% set x = '\\n' * 99999 %}{{ x | indent(99999) }}",
    "tojson": "{{ ([[1]] * 9999) | tojson(indent=99999) }}",
    "wordwrap": "{% set x = 'x ' * 99999 %}{{ x | wordwrap(1, wrapstring=x) }}",
    "format": "{{ '%10000000000d' | format(1) }}",
    "format_star": "{{ '%*d' % (10**10, 1) }}",
    "format_many": "{% set x = 'x' * 99999 %}{{ ('%(x)s' * 9999) | format(x=x) }}",
    "format_method": "{% set x = 'x' * 99999 %}{{ ('{0}' * 9999).format(x) }}",
    "format_width": "{{ '{:10000000000}'.format(1) }}",
    "format_nested_width": "{{ '{:{}}'.format(1, 10**10) }}",
    "translate": "{% set x = 'x' * 99999 %}{{ x.translate({120: x}) }}",
    "round": "{{ 1.5 | round(10**9, 'ceil') }}",
    "sum": "{{ ([range(999) | list] * 9999) | sum(start=[]) | length }}",
    "bytes": "{{ (1).to_bytes(10**10) }}",
    "lipsum": "{{ lipsum(n=10**9) }}",
    "slow": "{% for i in range(999) %}{{ ('www.a.bc ' * 9999) | urlize | length }}{% endfor %}",
}


# What ends these is not ours.
OTHERWISE = dict.fromkeys(("macro", "block", "recursive_loop"), "maximum recursion depth")
OTHERWISE |= {"range": "Range too big", "lipsum": "'lipsum' is undefined"}


@pytest.mark.parametrize("name", RUNAWAYS)
def test_a_template_that_runs_away_is_stopped(name):
    template = ChatTemplate(RUNAWAYS[name], "<s>", "</s>")
    start = time.thread_time()
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=OTHERWISE.get(name, "template is stopped")) as caught:
            template.render(MESSAGES)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)
    assert time.thread_time() - start < 30  # of a busy machine that traces; 1 s without
    assert peak < 400e6


def test_a_long_conversation_is_no_runaway():
    source = (
        "{% set n = namespace(text='', kept=[]) %}{% for m in messages %}"
        "{% set n.text = n.text + m.role ~ ': ' ~ (m.content | trim) + '\n' %}"
        "{% set n.kept = n.kept + [m] %}{% endfor %}{{ n.text }}{{ n.kept | tojson(indent=2) }}"
    )
    messages = [{"role": "user", "content": "x" * 2000}] * 400
    text = ChatTemplate(source, "<s>", "</s>").render(messages)
    assert len(text) > 1_600_000


NAMED = {"default": "D{{ messages[0].content }}", "tool_use": "T{{ tools | tojson }}", "rag": "R"}


@pytest.mark.parametrize("form", ["object", "list", "files"])
def test_named_templates_are_chosen_as_transformers_does(form, tmp_path):
    config: dict[str, object] = {}
    if form == "object":
        config = {"chat_template": NAMED}
    elif form == "list":
        config = {"chat_template": [{"name": n, "template": t} for n, t in NAMED.items()]}
    else:
        (tmp_path / "chat_template.jinja").write_text(NAMED["default"])
        (tmp_path / "additional_chat_templates").mkdir()
        for name in ("tool_use", "rag"):
            (tmp_path / "additional_chat_templates" / f"{name}.jinja").write_text(NAMED[name])
    template = read_chat_template(tmp_path, config, "<s>", "</s>")
    assert template is not None
    assert template.sources == NAMED
    assert template.render(MESSAGES) == "Dé"
    assert template.render(MESSAGES, tools=[{"a": 1}]) == 'T[{"a": 1}]'
    assert template.render(MESSAGES, name="rag") == "R"
    assert template.render(MESSAGES, tools=[{"a": 1}], name="default") == "Dé"
    with pytest.raises(ValueError, match="no template 'cot', only default, rag, tool_use"):
        template.render(MESSAGES, name="cot")
    assert small_files(tmp_path).keys() == (
        {"chat_template.jinja"}
        | {f"additional_chat_templates/{name}.jinja" for name in ("tool_use", "rag")}
        if form == "files"
        else set()
    )


@pytest.mark.parametrize("given", [3, [{"name": "default"}], {"default": 1}, ["x"]])
def test_a_chat_template_of_another_kind_is_named(given, tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer_config.json: chat_template must be a text"):
        read_chat_template(tmp_path, {"chat_template": given}, "<s>", "</s>")


@pytest.mark.parametrize("source", ["{{ 1 // 0 }}", "{{ [1][messages.x.y] }}", "{{ 'x' | nope }}"])
def test_a_template_that_fails_is_one_line(source):
    with pytest.raises(ValueError, match=r"chat.template") as caught:
        ChatTemplate(source, "<s>", "</s>").render(MESSAGES)
    assert "\n" not in str(caught.value)
