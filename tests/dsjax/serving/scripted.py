"""A server whose model says what a test wants: real but for the choice of tokens."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dsjax.config import EngineConfig
from dsjax.data.generation_defaults import GenerationDefaults
from dsjax.engine import Engine
from dsjax.serving.conversations import Prepared
from tests.dsjax.deepseek_checkpoints import CONFIG
from tests.dsjax.serving.chat_tokenizers import chat_tokenizer, write_marked
from tests.dsjax.serving.served import Served, serving
from tests.small_models import random_model


class Script:
    """A mask that lets one text through, and then its end."""

    def __init__(self, ids: list[int]) -> None:
        self._left = list(ids)

    def allowed(self) -> np.ndarray:
        """Returns the bit of the next token."""
        bits = np.zeros(-(-CONFIG.vocab_size // 32), np.uint32)
        bits[self._left[0] // 32] = np.uint32(1) << np.uint32(self._left[0] % 32)
        return bits

    def advance(self, token: int) -> None:
        """Takes the token."""
        assert token == self._left.pop(0)
        if not self._left:
            self._left = [token]


@dataclass
class Scripted:
    """A server, what it is to say next, and the messages that it was last asked with.

    Attributes:
        text: the next answers, as R1 writes them; None lets the model say what it says.
    """

    served: Served
    text: str | None = None
    asked: Any = None


@contextlib.contextmanager
def a_scripted_server(
    folder: Path, keys: tuple[str, ...] = (), **limits: Any
) -> Iterator[Scripted]:
    """Runs one, with R1's template and DeepSeek's tokenizer."""
    write_marked(folder)
    tokenizer = chat_tokenizer("R1", folder)
    config = EngineConfig(
        max_batch=1, batch_sizes=(1,), chunks=((1, 64),), num_pages=80, warm_up=False
    )
    greedy = GenerationDefaults(temperature=0.0)  # a draw from 102,400 tokens takes long on a CPU
    model = random_model(replace(CONFIG, max_length=4096))
    with Engine(model, tokenizer, config) as engine, serving(engine, keys, greedy) as served:
        scripted = Scripted(served)
        conversations = served.server.service.conversations
        prepare = conversations.prepare

        def follow(messages: Any, **asked: Any) -> Prepared:
            ready = prepare(messages, **asked)
            scripted.asked = list(messages)
            if scripted.text is None:
                return ready
            ids = [*tokenizer.encode(scripted.text), tokenizer.eos_id]
            return replace(ready, mask=lambda: Script(ids))

        conversations.prepare = follow  # type: ignore[method-assign]
        yield scripted
