"""A conversation that goes on: what it tells the model, keeps, forgets and measures."""

import pytest

from dsjax.data.chat import ChatTemplate
from dsjax.data.generation_defaults import GenerationDefaults
from dsjax.serving.dialogue import Dialogue
from tests.dsjax.engine.small_engine import TOKENIZER, an_engine
from tests.dsjax.serving.served import TEMPLATE


@pytest.fixture
def engine():
    with an_engine() as made:
        made.tokenizer = type(TOKENIZER)()
        made.tokenizer.chat_template = ChatTemplate(TEMPLATE, "", "")
        yield made


def said(reply) -> str:
    return "".join(delta.content or "" for delta in reply)


def test_an_answer_is_the_engine_s_and_becomes_part_of_what_is_read(engine):
    letters = range(ord("a"), ord("z") + 1)  # what is read again is then what was written
    dialogue = Dialogue(engine, system="Be kind", max_tokens=9, allowed_tokens=letters)
    first = dialogue.ask("Hello")
    text = said(first)
    dialogue.keep(first)
    assert dialogue.messages == [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": text},
    ]
    assert first.speed.num_prompt == len(TOKENIZER.encode_prompt("s:Be kind\nu:Hello\na:"))
    assert first.speed.num_tokens == 9
    assert 0 < first.speed.first_seconds < first.speed.seconds
    assert (first.speed.tokens_per_second or 0) > 0
    second = dialogue.ask("More")
    said(second)
    # Of what was read before, all full pages of 8 tokens are shared: 22 tokens and 8 of the answer.
    assert second.speed.num_shared == 24
    dialogue.keep(second)
    assert [one["role"] for one in dialogue.whole()] == ["system", *["user", "assistant"] * 2]
    dialogue.reset()
    assert dialogue.whole() == [{"role": "system", "content": "Be kind"}]


def test_another_answer_has_other_noise_and_takes_the_place_of_the_first(engine):
    dialogue = Dialogue(engine, temperature=1.0, max_tokens=12)
    texts = []
    for begin in (lambda: dialogue.ask("Hello"), dialogue.retry, dialogue.retry):
        reply = begin()
        texts.append(said(reply))
        dialogue.keep(reply)
        assert len(dialogue.messages) == 2
    assert len({*texts}) == 3
    assert dialogue.messages[-1]["content"] == texts[-1]
    again = Dialogue(engine, temperature=1.0, max_tokens=12)
    assert said(again.ask("Hello")) == texts[0]  # the same seed, the same answer


def test_a_stopped_answer_keeps_what_there_is(engine):
    dialogue = Dialogue(engine, ignore_eos=True)
    reply = dialogue.ask("Hello")
    parts = iter(reply)
    begun = next(parts).content or ""
    reply.cancel()
    rest = "".join(delta.content or "" for delta in parts)
    assert reply.generation is not None
    assert reply.generation.finish == "cancelled"
    assert reply.speed.num_tokens < 100
    dialogue.keep(reply)
    assert dialogue.messages[-1]["content"] == begun + rest


def test_what_cannot_be_asked_changes_nothing(engine):
    dialogue = Dialogue(engine, max_tokens=4)
    with pytest.raises(ValueError, match="nothing was asked yet"):
        dialogue.retry()
    with pytest.raises(ValueError, match=r"has 20\d tokens, and there is room for 128"):
        dialogue.ask("a" * 200)
    assert dialogue.messages == []
    engine.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        Dialogue(engine)


def test_defaults_are_the_model_s_and_room_bounds_them(engine):
    usual = GenerationDefaults(max_tokens=5, temperature=0.0)
    reply = Dialogue(engine, usual, ignore_eos=True).ask("Hi")
    said(reply)
    assert reply.speed.num_tokens == 5
    reply = Dialogue(engine, usual, ignore_eos=True, max_tokens=1000).ask("Hi")
    said(reply)
    assert reply.speed.num_prompt + reply.speed.num_tokens == 128
