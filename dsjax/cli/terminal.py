"""A conversation on a terminal: lines are read, answers come as they are made."""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from rich.console import Console

from dsjax.files import write_text
from dsjax.serving.dialogue import Dialogue, Reply

# What moves a cursor, rings a bell or begins an escape sequence: an answer is text, no more.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_HELP = """\
/system TEXT   what the model is told before all else; without TEXT shows it, "" removes it
/reset         forget what was said
/retry         another answer to the last message
/save FILE     write the conversation as JSON, as OpenAI's API has messages
/exit          leave; so does Ctrl-D
Ctrl-C stops an answer. Alt-Enter begins a new line. A message that begins with / is written //."""


class Reader(Protocol):
    """Reads what the user says."""

    def __call__(self) -> str:
        """Returns the next message.

        Raises:
            EOFError: there is none.
            KeyboardInterrupt: what was begun is dropped.
        """


def make_reader() -> Reader:
    """Returns a line editor on a terminal, and else the lines of standard input."""
    if not sys.stdin.isatty():
        return _line_of_stdin
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(key_bindings=keys, enable_history_search=True)
    return lambda: session.prompt("> ", prompt_continuation="  ")


def _line_of_stdin() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")


class Terminal:
    """Talks with a model until the user leaves."""

    def __init__(self, dialogue: Dialogue, read: Reader, out: Console, notes: Console) -> None:
        """Begins nothing yet.

        Args:
            dialogue: the conversation.
            read: gives the user's messages.
            out: where answers go.
            notes: where all else goes: speeds, faults, what a command did.
        """
        self._dialogue = dialogue
        self._read = read
        self._out = out
        self._notes = notes
        self._saved: set[Path] = set()
        self._commands: dict[str, Callable[[str], None]] = {
            "system": self._system,
            "reset": self._reset,
            "retry": self._retry,
            "save": self._save,
            "help": lambda _: self._note(_HELP),
        }

    def run(self) -> None:
        """Answers until there is no more to read, or `/exit`."""
        while True:
            try:
                text = self._read().strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                self._note("Ctrl-D or /exit leaves")
                continue
            if text in ("/exit", "/quit"):
                return
            if not text:
                continue
            try:
                self._take(text)
            except (ValueError, OSError) as error:
                self._note(f"error: {error}")

    def _take(self, text: str) -> None:
        if text.startswith("//") or not text.startswith("/"):
            said = text.removeprefix("/") if text.startswith("//") else text
            self._answer(lambda: self._dialogue.ask(said))
            return
        name, _, rest = text[1:].partition(" ")
        command = self._commands.get(name)
        if command is None:
            known = ", ".join(f"/{one}" for one in [*self._commands, "exit"])
            raise ValueError(f"/{name}: there is no such command, only {known}; // begins a text")
        command(rest.strip())

    def _note(self, text: str) -> None:
        self._notes.out(_plain(text), style="dim", highlight=False)

    # Commands

    def _system(self, text: str) -> None:
        if text:
            self._dialogue.system = "" if text == '""' else text
        self._note(f"system: {self._dialogue.system or 'none'}")

    def _reset(self, _: str) -> None:
        self._dialogue.reset()
        self._note("the conversation is empty")

    def _retry(self, _: str) -> None:
        self._answer(self._dialogue.retry)

    def _save(self, name: str) -> None:
        if not name:
            raise ValueError("/save: needs the name of a file")
        path = Path(name).expanduser()
        if path.exists() and path.resolve() not in self._saved:
            raise ValueError(f"/save {path}: is there already")
        messages = self._dialogue.whole()
        write_text(path, json.dumps(messages, ensure_ascii=False, indent=2) + "\n")
        self._saved.add(path.resolve())
        self._note(f"{len(messages)} messages are in {path}")

    # Answers

    def _answer(self, begin: Callable[[], Reply]) -> None:
        replies: list[Reply] = []

        def stop() -> None:
            for reply in replies:
                reply.cancel()

        with _on_interrupt(stop) as interrupts:
            reply = begin()
            replies.append(reply)
            if interrupts:  # one that came before there was something to stop
                stop()
            self._show(reply)
        made = reply.generation
        assert made is not None
        if made.finish == "error":
            self._dialogue.take_back()
            raise ValueError(made.error or "the answer could not be made")
        self._dialogue.keep(reply)
        self._note(_figures(reply, self._dialogue.max_length))

    def _show(self, reply: Reply) -> None:
        kind = ""
        for delta in reply:
            new = "thoughts" if delta.reasoning_content is not None else "text"
            if kind == "thoughts" and new == "text":
                self._out.out("\n")
            if new == "thoughts" and not kind:
                self._note("thinking …")
            kind = new
            style = "dim italic" if kind == "thoughts" else None
            text = delta.content if delta.reasoning_content is None else delta.reasoning_content
            self._out.out(_plain(text or ""), end="", style=style, highlight=False)
        self._out.out("")


@contextmanager
def _on_interrupt(stop: Callable[[], None]) -> Iterator[list[int]]:
    """Calls a function on Ctrl-C, which then raises nothing; gives the interrupts so far."""
    interrupts: list[int] = []

    def take(number: int, _: object) -> None:
        interrupts.append(number)
        stop()

    before = signal.signal(signal.SIGINT, take)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)


def _plain(text: str) -> str:
    """Returns a text without what a terminal would obey."""
    return _CONTROLS.sub("�", text.replace("\r\n", "\n"))


def _figures(reply: Reply, max_length: int) -> str:
    assert reply.generation is not None
    speed = reply.speed
    parts = [f"{speed.num_tokens} tokens"]
    if (rate := speed.tokens_per_second) is not None:
        parts.append(f"{rate:.1f} tokens/s")
    parts.append(f"first after {speed.first_seconds:.2f} s")
    parts.append(f"{speed.num_prompt + speed.num_tokens} of {max_length} used")
    why = {"cancelled": "stopped", "length": "cut: no room or no tokens left"}
    if (said := why.get(reply.generation.finish)) is not None:
        parts.append(said)
    return f"[{', '.join(parts)}]"
