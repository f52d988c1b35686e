"""Chat templates: the dialect of transformers."""

import pytest

from dsjax.data.chat import ChatTemplate, read_chat_template

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
