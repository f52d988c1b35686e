"""One conversation answered by a model in the process, without a server."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

from dsjax.data.tokenizer import Tokenizer
from dsjax.engine import generate
from dsjax.families.answer_parts import Answer
from dsjax.inference.sampling import Sampling
from dsjax.model import DeepSeekV2
from dsjax.serving.conversations import Conversations

# A tokenizer's vocabulary is handed to the grammars once.
_KNOWN: WeakKeyDictionary[Tokenizer, Conversations] = WeakKeyDictionary()


def answer(
    model: DeepSeekV2,
    tokenizer: Tokenizer,
    sampling_of: Callable[..., Sampling],
    end_ids: Iterable[int],
    messages: Sequence[dict[str, Any]],
    **asked: Any,
) -> Answer:
    """Answers a conversation.

    Args:
        model: the model.
        tokenizer: of the model.
        sampling_of: returns how the answer to a prompt is made, with fields of its own.
        end_ids: tokens that end the answer.
        messages: of the conversation.
        **asked: what else `Conversations.prepare` takes.

    Raises:
        ValueError: begins with the field that is to blame.
    """
    chats = _KNOWN.get(tokenizer)
    if chats is None:
        chats = _KNOWN[tokenizer] = Conversations(tokenizer, model.config.vocab_size, end_ids)
    ready = chats.prepare(messages, **asked)
    prompt = list(ready.prompt)
    how = sampling_of(prompt, show_tokens=ready.show_tokens)
    (found,) = generate(model, tokenizer, [prompt], how, masks=[ready.mask()], end_ids=end_ids)
    parser = ready.parser()
    parser.feed(found.text)
    parser.finish()
    return replace(parser.answer, finish_reason=parser.finish_reason(found.finish))
