"""The chat page in a real browser, against a real server."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.dsjax.serving.scripted import Scripted, a_scripted_server

CHROMIUMS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
FOUND = next((path for name in CHROMIUMS if (path := shutil.which(name))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(FOUND is None, reason=f"needs one of {', '.join(CHROMIUMS)}"),
]
MARKDOWN = """# A heading

Some `code`, ~~old~~ **strong *both***, snake_case_name, 2 * 3 * 4 and 中文 **粗体**。
See [docs](https://example.org/a_(b)) or https://example.org/x.

1. one
   - inner 一
   - inner 二
2. two

> quoted

| a | b |
|:-|-:|
| 1 | `x|y` |

```python
def f(x):
    return "<b>" + x
```

Math \\(a_1 * b_1\\) stays."""
EVIL = """<script>window.hit=1</script>
<img src=x onerror="window.hit=1"> <svg/onload=window.hit=1>
[a](javascript:window.hit=1) [b](data:text/html,<script>window.hit=1</script>) [c](JaVaScRiPt:1)
![pic](https://example.org/track.png)

| <img src=x onerror="window.hit=1"> | [x](vbscript:1) |
|-|-|
| </td><script>window.hit=1</script> | b |

```<img/src=x>
</code></pre><script>window.hit=1</script>
```"""
CALLS = (
    "I must look.</think>I look.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>"
    "weather\n"
    '```json\n{"city": "<b>北京</b>"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
)
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def scripted(tmp_path_factory) -> Iterator[Scripted]:
    with a_scripted_server(tmp_path_factory.mktemp("r1")) as made:
        yield made


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=FOUND, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def opened(browser, scripted):
    """Opens pages, each for a new user; they ask nobody else, and report no fault."""
    contexts, faults = [], []

    def note(text: str, is_fault: bool) -> None:
        if is_fault:
            faults.append(text)

    def open_one(url: str = scripted.served.url, **options) -> Page:
        usual = {"locale": "en-GB", "viewport": {"width": 1100, "height": 800}}
        contexts.append(browser.new_context(**usual | options))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda said: note(said.text, "Content Security" in said.text))
        page.on("request", lambda r: note(r.url, not r.url.startswith((url, "blob:"))))
        page.goto(url)
        return page

    scripted.text = None
    yield open_one
    for context in contexts:
        context.close()
    scripted.served.wait_until_idle()
    assert faults == []


def ask(page: Page, text: str) -> None:
    page.locator("#text").fill(text)
    page.locator("#text").press("Enter")


def show(page: Page, **answer: object) -> None:
    """Lets the page draw an answer that is whole, as after a reload: the tests' model is slow."""
    messages = [{"role": "user", "content": EVIL}, {"role": "assistant", **answer}]
    keep = "(messages) => sessionStorage.setItem('dsjax.messages', JSON.stringify(messages))"
    page.evaluate(keep, messages)
    page.reload()


def answered(page: Page):
    """Waits for the last answer's end and returns it."""
    expect(page.locator("#send")).to_be_visible(timeout=60_000)
    return page.locator("article.assistant").last


def picture(page: Page, name: str) -> None:
    """Keeps a picture where a person wants to look at them."""
    if folder := os.environ.get("DSJAX_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png")


def test_the_page_is_one_file_that_may_run_its_own_script_alone(scripted):
    answer = httpx.get(f"{scripted.served.url}/")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert re.findall(r"""(?:src|href)=["']?[^"'>]*|@import|url\(""", answer.text) == [
        'href="data:,'
    ]
    assert "/" not in httpx.get(f"{scripted.served.url}/openapi.json").json()["paths"]


def test_thoughts_and_speed(opened, scripted):
    page = opened()
    scripted.text = "They *ask*.</think># A **heading**"
    ask(page, "Show <b>me</b>")
    answer = answered(page)
    expect(page.locator("#model")).to_have_text("small")
    assert page.locator("article.user .body").inner_text() == "Show <b>me</b>"
    expect(answer.locator("> .body h1 strong")).to_have_text("heading")
    details = answer.locator("details")
    assert details.get_attribute("open") is None  # folded
    assert details.locator("div").text_content() == "They *ask*."
    note = answer.locator(".note").inner_text()
    assert re.fullmatch(r"\d+ tokens · [\d.]+ tokens/s · first after [\d.]+ s", note)
    details.locator("summary").click()
    expect(details.locator("div")).to_be_visible()
    page.reload()  # the conversation is still there
    expect(page.locator("article.assistant h1 strong")).to_have_text("heading")


def test_markdown(opened):
    page = opened()
    show(page, content=MARKDOWN, reasoning_content="Hm.")
    body = page.locator("article.assistant > .body")
    expect(body.locator("h1")).to_have_text("A heading")
    assert body.locator("strong").all_inner_texts() == ["strong both", "粗体"]
    assert body.locator("em").all_inner_texts() == ["both"]
    assert "snake_case_name, 2 * 3 * 4 and 中文" in body.inner_text()
    assert body.locator("del").inner_text() == "old"
    links = [link.get_attribute("href") for link in body.locator("a").all()]
    assert links == ["https://example.org/a_(b)", "https://example.org/x"]
    assert body.locator("ol > li").count() == 2
    assert body.locator("ol ul > li").all_inner_texts() == ["inner 一", "inner 二"]
    assert body.locator("blockquote").inner_text() == "quoted"
    assert body.locator("td").first.inner_text() == "1"
    assert body.locator("pre code").text_content() == 'def f(x):\n    return "<b>" + x'
    assert body.locator(".code-head span").inner_text() == "python"
    assert body.locator(".math").inner_text() == "\\(a_1 * b_1\\)"
    picture(page, "desktop")


def test_an_answer_brings_no_markup_of_its_own(opened):
    page = opened()
    function = {"name": EVIL, "arguments": json.dumps({"a": EVIL})}
    calls = [{"id": "1", "type": "function", "function": function}]
    show(page, content=EVIL, reasoning_content=EVIL, tool_calls=calls, note=EVIL, fault=EVIL)
    page.locator("summary").click()
    assert page.evaluate("window.hit") is None
    assert page.locator("#log").locator("script, img, svg, iframe, style").count() == 0
    links = [link.get_attribute("href") for link in page.locator("#log a").all()]
    assert links == ["https://example.org/track.png"]  # a link to follow, no picture to load
    for part in ("details > div", ".name", ".call pre", ".note", ".fault", "> .body"):
        shown = page.locator(f"article.assistant {part}").text_content() or ""
        assert "<script>window.hit=1</script>" in shown, part


def test_stop_and_retry(opened, scripted):
    page = opened()
    ask(page, "Go on")  # a random model says some 4,000 tokens
    page.locator("details div").filter(has_text=re.compile(r"\S{3}")).wait_for(state="attached")
    page.locator("#stop").click()
    note = answered(page).locator(".note")
    expect(note).to_contain_text("stopped")
    scripted.served.wait_until_idle(5)
    scripted.text = "Short.</think>Done."
    page.get_by_role("button", name="Retry").click()
    expect(answered(page).locator("> .body")).to_have_text("Done.")
    assert page.locator("article").count() == 2
    assert scripted.asked == [{"role": "user", "content": "Go on"}]


def test_calls_and_their_results(opened, scripted):
    page = opened()
    page.get_by_role("button", name="Settings").click()
    page.locator("#tools").fill("{")
    page.get_by_role("button", name="Done").click()
    expect(page.locator("#settings-note")).to_have_text("Tools: not a JSON list")
    page.locator("#tools").fill(json.dumps(TOOLS))
    page.locator("#system").fill("Be kind")
    page.locator("#temperature").fill("0.5")
    page.get_by_role("button", name="Done").click()
    scripted.text = CALLS
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "Weather?")
    asked = sent.value.post_data_json
    assert asked["temperature"] == 0.5
    assert asked["tools"] == TOOLS
    assert asked["messages"][0] == {"role": "system", "content": "Be kind"}
    call = answered(page).locator(".call")
    assert call.locator(".name").inner_text() == "Call: weather"
    assert json.loads(call.locator("pre").inner_text()) == {"city": "<b>北京</b>"}
    picture(page, "call")
    call.locator("textarea").fill("21 °C")
    scripted.text = "Now I know.</think>21 °C."
    page.get_by_role("button", name="Send results").click()
    expect(answered(page).locator("> .body")).to_have_text("21 °C.")
    roles = [one["role"] for one in scripted.asked]
    assert roles == ["system", "user", "assistant", "tool"]
    assert scripted.asked[-1]["content"] == "21 °C"
    assert scripted.asked[-1]["tool_call_id"] == scripted.asked[-2]["tool_calls"][0]["id"]


def test_a_phone_in_chinese(opened, scripted):
    page = opened(
        locale="zh-CN",
        viewport={"width": 360, "height": 640},
        device_scale_factor=2,
        is_mobile=True,
        has_touch=True,
        color_scheme="dark",
    )
    scripted.text = "想。</think>好。"
    # Enter that ends a word of an input method sends nothing.
    page.locator("#text").fill("你好")
    page.locator("#text").dispatch_event("keydown", {"key": "Enter", "isComposing": True})
    assert page.locator("article").count() == 0
    page.get_by_role("button", name="发送").tap()
    answer = answered(page)
    expect(answer.locator("summary")).to_have_text("思考过程")
    assert re.search(r"词元/秒", answer.locator(".note").inner_text())
    show(page, content=f"{MARKDOWN}\n\n{'长' * 300}\n\n```\n{'wide ' * 60}\n```")
    expect(page.locator("article h1")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    for name in ("#text", "#send", "header button >> nth=1"):
        box = page.locator(name).bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360
        assert box["y"] + box["height"] <= 640
        assert box["height"] >= 36  # for a finger
    picture(page, "phone")
    page.get_by_role("button", name="设置").tap()
    picture(page, "phone-settings")
    page.locator("#language").select_option("en")
    page.get_by_role("button", name="完成").tap()
    expect(page.locator("#send")).to_have_text("Send")


def test_faults_are_said(opened, scripted):
    page = opened()
    scripted.text = "Thought.</think>Yes."
    page.get_by_role("button", name="Settings").click()
    page.locator("#topP").fill("7")
    page.get_by_role("button", name="Done").click()
    ask(page, "Hello")
    expect(answered(page).locator(".fault")).to_contain_text("top_p")
    page.get_by_role("button", name="Settings").click()
    page.locator("#topP").fill("")
    page.get_by_role("button", name="Done").click()
    page.get_by_role("button", name="Retry").click()
    expect(answered(page).locator("> .body")).to_have_text("Yes.")
    page.get_by_role("button", name="New chat").click()
    assert page.locator("article").count() == 0


def test_a_key_is_asked_for(opened, tmp_path):
    with a_scripted_server(tmp_path, ("secret",)) as scripted:
        page = opened(scripted.served.url)
        expect(page.locator("#settings-note")).to_contain_text("needs an API key")
        page.locator("#key").fill("secret")
        page.get_by_role("button", name="Done").click()
        expect(page.locator("#model")).to_have_text("small")
        scripted.text = "Thought.</think>Yes."
        ask(page, "Hello")
        expect(answered(page).locator("> .body")).to_have_text("Yes.")
        assert "secret" not in page.evaluate("JSON.stringify(localStorage)")
        page.context.close()


def test_every_beginning_of_a_text_is_shown_as_it_is_alone(opened):
    """Blocks that did not change are kept while a text grows; the end is the same."""
    differ = """(text) => {
      const grown = document.createElement("div");
      for (let end = 1; end <= text.length; end += 1) {
        Markdown.show(grown, text.slice(0, end));
        const alone = document.createElement("div");
        Markdown.show(alone, text.slice(0, end));
        if (grown.innerHTML !== alone.innerHTML) return text.slice(0, end);
      }
      return null;
    }"""
    page = opened()
    for text in (MARKDOWN, EVIL, CALLS, "- a\n\n  b\n- c\n1. d\n\n\n***\n__x__ _y_\n~~~\nz"):
        assert page.evaluate(differ, text) is None
    # What would take a parser that goes back for ever.
    for part in ("*", "**a ", "[", "`", "``a`", "> ", "|", "- ", "\\(", "$$", "_a*", "![]("):
        seconds = page.evaluate(
            """(text) => {
              const begun = performance.now();
              Markdown.show(document.createElement("div"), text);
              return (performance.now() - begun) / 1000;
            }""",
            part * (30_000 // len(part)),
        )
        assert seconds < 5, part
