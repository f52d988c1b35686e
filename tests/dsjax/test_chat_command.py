"""`dsjax chat`: its commands, what it writes, and Ctrl-C on a terminal of its own."""

import io
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pexpect
import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from dsjax.cli import app
from dsjax.cli.terminal import Terminal
from dsjax.data.chat import ChatTemplate
from dsjax.engine import Engine
from dsjax.serving.dialogue import Dialogue
from tests.dsjax.deepseek_checkpoints import CONFIG, write_checkpoint
from tests.dsjax.engine.small_engine import TOKENIZER, an_engine
from tests.dsjax.serving.served import TEMPLATE

REPOSITORY = Path(__file__).resolve().parents[2]
# What the line editor writes when it is ready: pastes are marked, and ">".
PROMPT = r"\?2004h[^>\n]*>"


class Session:
    """A terminal over the small engine; what it writes is read as text."""

    def __init__(self, engine: Engine, **options: Any) -> None:
        usual: dict[str, Any] = {"max_tokens": 5, "allowed_tokens": range(ord("a"), ord("z") + 1)}
        self.dialogue = Dialogue(engine, **usual | options)
        self.answers, self.notes = io.StringIO(), io.StringIO()
        self._consoles = (Console(file=self.answers), Console(file=self.notes, width=500))

    def run(self, *lines: str | type[BaseException]) -> tuple[str, str]:
        left = [*lines]

        def read() -> str:
            line = left.pop(0) if left else EOFError
            if isinstance(line, str):
                return line
            raise line

        Terminal(self.dialogue, read, *self._consoles).run()
        assert not left or lines[len(lines) - len(left) - 1] == "/exit"
        found = self.answers.getvalue(), self.notes.getvalue()
        for file in (self.answers, self.notes):
            file.seek(0)
            file.truncate()
        return found


@pytest.fixture
def session() -> Iterator[Session]:
    with an_engine() as engine:
        engine.tokenizer = type(TOKENIZER)()
        engine.tokenizer.chat_template = ChatTemplate(TEMPLATE, "", "")
        yield Session(engine)


def test_answers_and_speeds(session):
    answers, notes = session.run("Hello", "", "  ", KeyboardInterrupt, "More")
    contents = [one["content"] for one in session.dialogue.messages]
    assert contents[0::2] == ["Hello", "More"]
    assert answers == "".join(f"{text}\n" for text in contents[1::2])
    speed = r"\[5 tokens, [\d.]+ tokens/s, first after [\d.]+ s, (\d+) of 128 used, cut: .*\]"
    first, leave, second = notes.splitlines()
    assert leave == "Ctrl-D or /exit leaves"
    used = [re.fullmatch(speed, line) for line in (first, second)]
    assert used[0]
    assert used[1]
    assert int(used[0][1]) < int(used[1][1])


def test_commands(session, tmp_path):
    file = tmp_path / "talk.json"
    _, notes = session.run("/system Be kind", "/system", "Hello", f"/save {file}", "/exit", "x")
    assert notes.count("system: Be kind") == 2
    saved = json.loads(file.read_text("utf-8"))
    assert saved == session.dialogue.whole()
    assert [one["role"] for one in saved] == ["system", "user", "assistant"]
    _, notes = session.run(f"/save {file}", '/system ""', "/reset", "/retry", "/nothing", "/save")
    said = notes.splitlines()
    assert said[0] == f"error: /save {file}: is there already"  # by a terminal before this one
    assert said[1:4] == [
        "system: none",
        "the conversation is empty",
        "error: nothing was asked yet",
    ]
    assert said[4].startswith("error: /nothing: there is no such command, only /system, ")
    assert said[5] == "error: /save: needs the name of a file"
    assert json.loads(file.read_text("utf-8")) == saved
    answers, notes = session.run("//etc", f"/save {tmp_path}/a", "/retry", f"/save {tmp_path}/a")
    assert session.dialogue.messages[0]["content"] == "/etc"
    assert len(answers.splitlines()) == 2
    assert notes.count(f"2 messages are in {tmp_path}/a") == 2  # its own file is written again
    assert "Ctrl-C stops" in session.run("/help")[1]


def test_a_message_without_room_is_one_line_and_changes_nothing(session):
    answers, notes = session.run("a" * 200)
    assert answers == ""
    assert re.fullmatch(r"error: the conversation has 20\d tokens, .* room for 128\n", notes)
    assert session.dialogue.messages == []


def test_an_answer_cannot_command_the_terminal():
    escape, bell, letter = 27, 7, ord("[")
    with an_engine() as engine:
        engine.tokenizer = type(TOKENIZER)()
        engine.tokenizer.chat_template = ChatTemplate(TEMPLATE, "", "")
        session = Session(engine, allowed_tokens=(escape, bell, letter), temperature=5.0)
        answers, _ = session.run("Hello", "More", "And more")
    kept = "".join(one["content"] for one in session.dialogue.messages[1::2])
    assert "\x1b" in kept or "\x07" in kept
    assert answers.translate({ord("\n"): None}) == re.sub("[\x1b\x07]", "�", kept)


def test_an_interrupt_stops_the_answer_and_nothing_else(session, monkeypatch):
    """The handler is the command's own: a signal is sent to this process while it answers."""
    before = signal.getsignal(signal.SIGINT)
    dialogue = Dialogue(session.dialogue._engine, ignore_eos=True)
    begin = dialogue.ask

    def ask(text: str):
        reply = begin(text)
        os.kill(os.getpid(), signal.SIGINT)
        return reply

    monkeypatch.setattr(dialogue, "ask", ask)
    session.dialogue = dialogue
    _, notes = session.run("Hello")
    assert notes.endswith("used, stopped]\n")
    assert signal.getsignal(signal.SIGINT) is before
    assert dialogue.messages[-1]["role"] == "assistant"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo terminals")
def test_on_a_terminal(tmp_path):
    folder = write_checkpoint(tmp_path / "model", replace(CONFIG, max_length=16_384))
    command = ["-m", "dsjax", "chat", str(folder), "--dtype=float32", "--temperature=1"]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "TERM": "xterm", "PYTHONPATH": str(REPOSITORY)}
    env["PROMPT_TOOLKIT_NO_CPR"] = "1"  # this terminal does not say where its cursor is
    with pexpect.spawn(
        sys.executable, command, env=env, encoding="utf-8", timeout=60, dimensions=(40, 200)
    ) as child:
        screen = io.StringIO()
        child.logfile_read, child.searchwindowsize = screen, 2000
        child.expect(PROMPT)
        # What is pasted is one message, of two lines here, until Enter is pressed.
        child.send("\x1b[200~first line\nsecond 行\x1b[201~")
        child.expect("second")
        child.send("\r")
        child.expect(r"\?2004l")  # the editor has ended
        child.expect(r"[A-Za-z]{3}")
        child.sendintr()  # in the middle of some 16,000 tokens
        child.expect(r"\[(\d+) tokens, [\d.]+ tokens/s,.*stopped\]")
        assert int(child.match[1]) < 16_000
        child.expect(PROMPT)
        child.sendintr()
        child.expect("Ctrl-D or /exit leaves")
        child.expect(PROMPT)
        child.send(f"/save {tmp_path}/talk.json\r")
        child.expect("2 messages are in")
        child.expect(PROMPT)
        child.sendeof()
        child.expect(pexpect.EOF)
    assert child.exitstatus == 0, screen.getvalue()
    saved = json.loads((tmp_path / "talk.json").read_text("utf-8"))
    assert saved[0]["content"] == "first line\nsecond 行"
    assert saved[1]["content"]


def test_under_a_cap_experts_stay_on_the_host(tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path / "model")
    command = ["chat", str(folder), "--dtype=float32", "--max-tokens=4", "--device-memory"]

    def run(memory: str) -> Result:
        return CliRunner().invoke(app, [*command, memory], input="Hello\n")

    whole = run("7GiB")
    assert whole.exit_code == 0, whole.stderr
    assert "experts:" not in whole.stderr
    # The same weights, of which all but the experts just fit.
    refused = re.search(r"take ([\d,]+) bytes", str(run("1KiB").exception))
    assert refused is not None
    rest = int(refused[1].replace(",", "")) + 1
    monkeypatch.setattr("dsjax.weights.host_experts._SHARE_OF_WEIGHTS", rest / (7 << 30))
    capped = run("7GiB")
    assert (capped.stdout, capped.exit_code) == (whole.stdout, 0), capped.stderr
    assert re.search(r"experts: [\d,]+ wanted, .*% were on the device", capped.stderr)


def test_what_stops_a_chat_is_one_line_before_weights_are_read(tmp_path, monkeypatch, capsys):
    from dsjax.cli import main

    folder = write_checkpoint(tmp_path / "model")
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    (bare / "tokenizer.json").unlink()
    monkeypatch.setattr("dsjax.weights.to_devices.load_array", None)
    for arguments, message in (
        ([folder, "--device-memory=1KiB"], r"device_memory=1024: .*without routed experts take"),
        ([folder, "--device-memory=much"], r"device_memory='much': must be a size such as 16GiB"),
        ([bare], r"bare: holds no tokenizer\.json, so there is no chat with it"),
    ):
        monkeypatch.setattr(sys, "argv", ["dsjax", "chat", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        assert exit_.value.code == 2
        assert re.search(message, capsys.readouterr().err.splitlines()[-1])


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("--top-p=3", "top_p=3.0: must be in (0, 1]"),
        ("--max-model-len=0", "engine.max_length=0: must be positive"),
        ("--max-tokens=0", "max_tokens=0: must be positive"),
    ],
)
def test_options_are_checked_before_weights_are_read(option, line, monkeypatch, capsys):
    from dsjax.cli import main

    monkeypatch.setattr(sys, "argv", ["dsjax", "chat", "nowhere", option])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err == f"error: {line}\n"
