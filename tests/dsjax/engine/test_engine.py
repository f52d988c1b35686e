"""The engine against the forward pass, whatever runs beside a request."""

import asyncio
import gc
import threading
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest
from flax import nnx

from dsjax.config import EngineConfig
from dsjax.engine import Engine, EngineError, Generation, Request, samples
from dsjax.inference.sampling import Sampling
from tests.dsjax.engine.small_engine import (
    CONFIG,
    MODEL_CONFIG,
    TOKENIZER,
    Alternating,
    WideTokenizer,
    an_engine,
    assert_greedy,
    compilations,
    random_requests,
    the_model,
)
from tests.small_models import random_model

GREEDY = Sampling(max_tokens=12, ignore_eos=True)


@pytest.mark.core
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_pages": 14},  # so few that requests are preempted
        {"share_prefixes": False},
        {"max_batch": 7, "batch_sizes": (2, 7), "chunks": ((3, 5), (1, 32))},
    ],
)
def test_every_token_is_the_best_one_of_a_forward_pass(changes):
    """Prompts and texts of random lengths, shared beginnings, chunks beside decoding."""
    requests = random_requests(1, 60)
    engine = an_engine(**changes)
    assert_greedy(requests, engine.generate(requests), the_model())
    figures = engine.figures()
    assert figures.pages_held == figures.num_running == figures.num_waiting == 0
    assert figures.tokens == sum(request.sampling.max_tokens for request in requests)
    assert figures.preemptions > 0 or "num_pages" not in changes
    assert (figures.shared_tokens > 0) == changes.get("share_prefixes", True)


@pytest.mark.slow
def test_the_real_vocabulary_under_a_random_schedule_of_500_requests():
    """Arrivals from another thread, in any order, with priorities."""
    config = replace(MODEL_CONFIG, vocab_size=102_400)
    model = random_model(config)
    requests = random_requests(2, 500, longest=40, most=20)
    rng = np.random.default_rng(3)
    sizes = replace(
        CONFIG, max_batch=16, batch_sizes=(16,), chunks=((2, 16),), page_size=4, num_pages=60
    )
    with Engine(model, WideTokenizer(), sizes) as engine:
        streams = []
        for request in requests:
            streams.append(engine.submit(replace(request, priority=int(rng.integers(3)))))
            if rng.random() < 0.2:
                time.sleep(rng.random() * 0.02)
        found = [stream.result(timeout=300) for stream in streams]
        assert engine.figures().preemptions > 0
    assert max(token for one in found for token in one.tokens) > 100_000
    ties = assert_greedy(requests, found, model)
    print(f"{ties} of {sum(len(one.tokens) for one in found)} tokens were near ties")


@pytest.mark.parametrize("sampling", [GREEDY, replace(GREEDY, temperature=1.0, top_p=0.9)])
def test_batch_mates_do_not_change_a_bit(sampling):
    """One shape of chunk, one of batch: the same log-probabilities to the last bit."""
    one_shape = {"batch_sizes": (), "chunks": ((1, 16),), "share_prefixes": False}
    requests = random_requests(4, 12, replace(sampling, logprobs=2))
    together = an_engine(**one_shape).generate(requests)
    for request, found in list(zip(requests, together, strict=True))[:5]:
        (alone,) = an_engine(**one_shape).generate([request])
        assert alone == found


def test_drawn_texts_depend_on_seed_prompt_and_sample_alone():
    drawn = replace(GREEDY, temperature=1.2, top_k=40)
    requests = random_requests(5, 16, drawn)
    first = an_engine().generate(requests)
    order = np.random.default_rng(6).permutation(len(requests))
    again = an_engine(num_pages=14).generate([requests[i] for i in order])
    assert [again[list(order).index(i)].tokens for i in range(16)] == [g.tokens for g in first]
    request = replace(requests[3], sampling=drawn)
    several = an_engine().generate(samples(request, 4))
    assert len({one.tokens for one in several}) == 4


def test_penalties_and_bias_are_those_of_a_loop_over_forward_passes():
    sampling = Sampling(
        max_tokens=10,
        ignore_eos=True,
        repetition_penalty=1.5,
        frequency_penalty=0.7,
        presence_penalty=0.4,
        logit_bias={65: 2.0, 66: -3.0},
        allowed_tokens=tuple(range(40, 200)),
    )
    requests = [replace(r, sampling=sampling) for r in random_requests(7, 6, most=2)]
    # Others without, and too few pages, so that counts are made anew.
    others = random_requests(8, 10)
    found = an_engine(num_pages=14).generate([*requests, *others])
    assert_greedy(others, found[6:], the_model())
    forward = jax.jit(lambda tokens: the_model()(tokens))
    for request, given in zip(requests, found, strict=False):
        tokens = list(request.prompt)
        for token in given.tokens:
            padded = np.zeros((1, 96), np.int32)
            padded[0, : len(tokens)] = tokens
            logits = np.array(forward(jnp.asarray(padded))[0, len(tokens) - 1], np.float64)
            logits[65] += 2
            logits[66] -= 3
            seen, text = list(set(tokens)), tokens[len(request.prompt) :]
            logits[seen] = np.where(logits[seen] > 0, logits[seen] / 1.5, logits[seen] * 1.5)
            counts = np.bincount(text, minlength=258)
            logits -= 0.7 * counts + 0.4 * (counts > 0)
            assert token == 40 + logits[40:200].argmax()
            tokens.append(token)


def test_log_probabilities_of_prompt_and_text():
    sampling = Sampling(max_tokens=5, ignore_eos=True, logprobs=3, prompt_logprobs=2)
    request = Request((256, *range(30, 60)), sampling)
    found, _ = an_engine().generate([request, *random_requests(9, 1)])
    whole = [*request.prompt, *found.tokens]
    tokens = np.zeros((1, 64), np.int32)
    tokens[0, : len(whole)] = whole
    want = jax.nn.log_softmax(the_model()(jnp.asarray(tokens))[0])
    assert found.prompt_logprobs is not None
    assert found.logprobs is not None
    listed = [*found.prompt_logprobs, *found.logprobs]
    assert [one.token for one in listed] == whole[1:]
    for place, one in enumerate(listed):
        np.testing.assert_allclose(one.logprob, want[place, one.token], atol=1e-4)
        best = np.sort(np.asarray(want[place]))[::-1]
        np.testing.assert_allclose([x for _, x in one.best], best[: len(one.best)], atol=1e-4)
    assert len(listed[0].best) == 2
    assert len(listed[-1].best) == 3


def test_a_mask_follows_the_tokens_chosen():
    masks = [Alternating() for _ in range(3)]
    requests = [
        replace(request, mask=mask, sampling=GREEDY)
        for request, mask in zip(random_requests(10, 3), masks, strict=True)
    ]
    found = an_engine().generate([*requests, *random_requests(11, 5)])
    for mask, one in zip(masks, found, strict=False):
        assert [token % 2 for token in one.tokens] == [0, 1] * 6
        assert mask.taken == list(one.tokens)


def test_nothing_is_compiled_after_the_start():
    engine = an_engine(warm_up=True, max_batch=3, batch_sizes=(1, 3))
    with compilations() as compiled:
        engine.generate(random_requests(12, 6))
        engine.generate(random_requests(13, 6, Sampling(temperature=1.0, logprobs=1)))
        odd = Sampling(top_k=3, temperature=0.5, frequency_penalty=1.0, prompt_logprobs=0)
        engine.generate(random_requests(14, 6, odd))
        assert not compiled
        jax.jit(lambda x: x + 41)(jnp.zeros(3)).block_until_ready()
        assert compiled  # which shows that it would have been seen


def test_streams_cancels_and_deadlines():
    with an_engine() as engine:
        request = Request((256, 65, 66), replace(GREEDY, max_tokens=100))
        (want,) = an_engine().generate([request])
        stream = engine.submit(request)
        pieces = list(stream)
        assert "".join(piece.text for piece in pieces) == want.text == stream.result().text
        assert [token for piece in pieces for token in piece.tokens] == list(want.tokens)

        async def both() -> list[str]:
            async def one() -> str:
                return "".join([piece.text async for piece in engine.submit(request)])

            return list(await asyncio.gather(one(), one()))

        assert asyncio.run(both()) == [want.text] * 2
        late = engine.submit(replace(request, deadline_seconds=0.0))
        assert late.result(10).finish == "deadline"
        stopped = engine.submit(request)
        for _ in stopped:
            stopped.cancel()
        assert stopped.result().finish == "cancelled"
        assert want.tokens[: len(stopped.result().tokens)] == stopped.result().tokens
        with pytest.raises(TimeoutError):
            engine.submit(request).result(timeout=0)
    with pytest.raises(EngineError, match="closed"):
        engine.submit(request)


def test_a_callback_that_raises_ends_its_requests_and_nothing_else():
    engine = an_engine()

    def raising(index: int, _: object) -> None:
        raise KeyError(index)

    with pytest.raises(KeyError):
        engine.generate(random_requests(15, 6), raising)
    figures = engine.figures()
    assert figures.pages_held == figures.num_waiting == figures.num_running == 0
    requests = random_requests(16, 4)
    assert_greedy(requests, engine.generate(requests), the_model())


# Before a step is launched, and while a thread launches it.
@pytest.mark.parametrize("where", ["read", "_read_rows"])
def test_a_failed_step_ends_what_ran_and_the_engine_goes_on(where: str, monkeypatch):
    engine = an_engine()
    requests = random_requests(17, 12)
    read, count = getattr(engine._runner, where), 0

    def failing(*arguments: object) -> object:
        nonlocal count
        count += 1
        if count == 8:
            raise RuntimeError("out of luck")
        return read(*arguments)

    monkeypatch.setattr(engine._runner, where, failing)
    found = engine.generate(requests)
    failed = [one for one in found if one.finish == "error"]
    assert 1 <= len(failed) <= 4
    assert all(one.error == "the device failed: RuntimeError: out of luck" for one in failed)
    whole = [pair for pair in zip(requests, found, strict=True) if pair[1].finish != "error"]
    assert_greedy([a for a, _ in whole], [b for _, b in whole], the_model())
    count = -1000
    monkeypatch.setattr(engine._runner, where, lambda *_: 1 / 0)
    assert {one.finish for one in engine.generate(requests)} == {"error"}
    with pytest.raises(EngineError, match="division"):
        engine.generate(requests)


def test_nan_logits_end_one_request():
    broken = nnx.clone(the_model())
    broken.embed.weight[...] = broken.embed.weight[...].at[ord("z")].set(jnp.nan)
    requests = [Request((256, ord("z")), GREEDY), Request((256, ord("a")), GREEDY)]
    engine = Engine(broken, TOKENIZER, CONFIG)
    bad, good = engine.generate(requests)
    assert (bad.finish, bad.tokens) == ("error", ())
    assert (good.finish, len(good.tokens)) == ("length", 12)


def test_weights_are_replaced_without_a_compile_and_prefixes_forgotten():
    requests = random_requests(18, 6)
    other = random_model(MODEL_CONFIG, seed=1)
    engine = an_engine()
    engine.generate(requests)
    engine.update_weights(other)
    assert_greedy(requests, engine.generate(requests), other)
    with pytest.raises(ValueError, match=r"weights.*cannot replace"):
        engine.update_weights(random_model(replace(MODEL_CONFIG, hidden_dim=16)))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(()), "is empty"),
        (Request((258,)), "token 258 is outside model.vocab_size=258"),
        (
            Request((1,) * 100, Sampling(max_tokens=29)),
            "100 tokens of prompt and max_tokens=29 exceed max_length=128",
        ),
        (Request((1,), Sampling(allowed_tokens=(300,))), "allowed_tokens: token 300 is outside"),
    ],
)
def test_what_can_never_run_is_refused_at_once(request_, message):
    engine = an_engine()
    with pytest.raises(ValueError, match=message):
        engine.submit(request_)
    with pytest.raises(ValueError, match=f"prompt 0: {message}"):
        engine.generate([request_])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_batch": 0}, "engine.max_batch=0"),
        ({"max_length": 999}, "engine.max_length=999: must be at most model.max_length=128"),
        ({"batch_sizes": (2, 3)}, r"engine.batch_sizes=\(2, 3\)"),
        ({"chunks": ((0, 4),)}, "engine.chunks"),
        ({"memory_fraction": 1.5}, "engine.memory_fraction=1.5"),
    ],
)
def test_sizes_that_cannot_be_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        an_engine(**changes)


@pytest.mark.slow
def test_nothing_leaks_over_thousands_of_requests():
    """Cancels, deadlines, errors in a grammar; pages free and memory flat at the end."""

    class Broken(Alternating):
        def advance(self, token: int) -> None:
            if len(self.taken) == 2:
                raise KeyError(token)
            super().advance(token)

    rng, process = np.random.default_rng(19), psutil.Process()
    after = []
    with an_engine(max_batch=8, batch_sizes=(8,), chunks=((2, 16),)) as engine:
        for round_ in range(10):
            streams = []
            for request in random_requests(20 + round_, 1000, longest=12, most=6):
                kind = rng.integers(8)
                if kind == 0:
                    request = replace(request, deadline_seconds=float(rng.random() * 0.5))
                elif kind == 1:
                    request = replace(request, mask=Broken())
                streams.append(engine.submit(request))
                if kind == 2:
                    streams[-1].cancel()
            found = {stream.result(120).finish for stream in streams}
            assert found >= {"length", "error", "cancelled"}
            del streams
            gc.collect()
            after.append(process.memory_info().rss)
        figures = engine.figures()
        assert figures.pages_held == figures.num_waiting == figures.num_running == 0
        assert figures.finished == 10_000
        assert engine._loop.num_open == 0
    assert after[-1] - after[4] < 2**25, after


def test_requests_from_many_threads_are_all_answered():
    requests = random_requests(40, 24)
    found: list[Generation | None] = [None] * len(requests)
    with an_engine() as engine:

        def ask(part: int) -> None:
            for index in range(part, len(requests), 4):
                found[index] = engine.submit(requests[index]).result(60)

        threads = [threading.Thread(target=ask, args=(part,)) for part in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert_greedy(requests, [one for one in found if one is not None], the_model())


def test_the_default_sizes_are_few():
    config = EngineConfig(max_batch=256)
    assert config.decode_sizes() == (1, 4, 16, 64, 256)
    assert config.chunk_shapes() == ((1, 64), (1, 256), (8, 256), (2, 1024), (1, 2048))
    assert EngineConfig(chunk_tokens=256).chunk_shapes() == ((1, 32), (8, 32), (2, 128), (1, 256))
