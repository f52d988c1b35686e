"""A small model and an engine for it, as tests of the engine want them."""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.config import EngineConfig
from dsjax.data.tokenizer import ByteTokenizer
from dsjax.engine import Engine, Generation, Request
from dsjax.inference.sampling import Sampling
from tests.small_models import SMALL, random_model

TOKENIZER = ByteTokenizer()


class WideTokenizer(ByteTokenizer):
    """Knows as many ids as DeepSeek's; those past the bytes are spelled by their number."""

    def __init__(self) -> None:
        super().__init__()
        self._token_bytes += [f"<{index}>".encode() for index in range(258, 102_400)]
        self.known_ids = np.ones(102_400, bool)


class Alternating:
    """Allows an even and an odd token in turn."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    def allowed(self) -> np.ndarray:
        return np.full(9, 0x55555555 << len(self.taken) % 2, np.uint32)

    def advance(self, token: int) -> None:
        self.taken.append(token)


MODEL_CONFIG = replace(SMALL, num_layers=2, vocab_size=258, max_length=128)
# Pages of 8 tokens, and chunks of 16 or of two times 8: borders come often.
CONFIG = EngineConfig(
    max_batch=4,
    batch_sizes=(4,),
    chunks=((1, 16), (2, 8)),
    page_size=8,
    num_pages=40,
    warm_up=False,
)


@functools.cache
def the_model():
    """The model of most tests."""
    return random_model(MODEL_CONFIG)


def an_engine(**changes: Any) -> Engine:
    """An engine over the model; its programs are compiled once a process."""
    return Engine(the_model(), TOKENIZER, replace(CONFIG, **changes))


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Gives a list that gets an entry for every program compiled meanwhile."""
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def random_requests(
    seed: int, count: int, sampling: Sampling | None = None, longest: int = 60, most: int = 24
) -> list[Request]:
    """Prompts and texts of random lengths; one prompt in three begins as others do."""
    rng = np.random.default_rng(seed)
    shared = [rng.integers(0, 256, longest).tolist() for _ in range(3)]
    found = []
    for index in range(count):
        size = int(rng.integers(1, longest))
        prompt = rng.integers(0, 256, size).tolist()
        if index % 3 == 0:
            kept = int(rng.integers(0, size + 1))
            prompt[:kept] = shared[rng.integers(3)][:kept]
        how = replace(
            sampling or Sampling(),
            max_tokens=int(rng.integers(1, most)),
            ignore_eos=True,
            seed=index,
        )
        found.append(Request((TOKENIZER.bos_id, *prompt), how))
    return found


_forward = jax.jit(lambda model, tokens: model(tokens))


def assert_greedy(requests: Sequence[Request], found: Sequence[Generation], model: Any) -> int:
    """Asserts that each token is the best one of a forward pass; returns how many were near ties.

    A causal pass over prompt and text gives the logits of every step.
    """
    ties = total = 0
    length = max(len(r.prompt) + len(g.tokens) for r, g in zip(requests, found, strict=True))
    length = -(-length // 32) * 32
    for start in range(0, len(requests), 16):
        tokens_BT = np.zeros((16, length), np.int32)
        some = list(zip(requests, found, strict=True))[start : start + 16]
        for row, (request, given) in zip(tokens_BT, some, strict=False):
            whole = [*request.prompt, *given.tokens]
            row[: len(whole)] = whole
        logits_BTW = np.asarray(_forward(model, jnp.asarray(tokens_BT)))
        for logits_TW, (request, given) in zip(logits_BTW, some, strict=False):
            assert len(given.tokens) == request.sampling.max_tokens, given
            for index, token in enumerate(given.tokens):
                row_W = logits_TW[len(request.prompt) - 1 + index]
                total += 1
                if token != row_W.argmax():
                    gap = (row_W.max() - row_W[token]) / abs(row_W.max())
                    assert gap <= 1e-5, (request, index, gap)
                    ties += 1
                    break  # from here on another text is as good
    assert ties <= 1e-3 * total
    return ties
