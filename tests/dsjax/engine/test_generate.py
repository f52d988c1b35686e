"""Generation from the latent cache against the forward pass, alone and in batches."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsjax.data.tokenizer import ByteTokenizer
from dsjax.engine import generate
from dsjax.inference.sampling import Sampling
from dsjax.kernels import Kernels
from dsjax.model import DeepSeekV2
from tests.small_models import SMALL, random_model

TOKENIZER = ByteTokenizer()
PROMPTS = [b"a", b"four", b"a longer prompt, past YaRN's 16", b"b" * 70]


@pytest.fixture(scope="module")
def model() -> DeepSeekV2:
    return random_model(replace(SMALL, num_layers=2, vocab_size=258, max_length=100))


def ids(prompt: bytes) -> list[int]:
    return [TOKENIZER.bos_id, *prompt]


@pytest.fixture(scope="module")
def greedy(model) -> list:
    return generate(model, TOKENIZER, [ids(p) for p in PROMPTS], Sampling(max_tokens=12))


@pytest.mark.core
def test_greedy_is_the_argmax_of_the_forward_pass_at_every_step(model, greedy):
    forward = jax.jit(lambda tokens: model(tokens))
    for prompt, found in zip(PROMPTS, greedy, strict=True):
        # Causal, so one pass over prompt and answer gives the logits of every step.
        tokens = ids(prompt) + list(found.tokens)
        padded = np.zeros((1, 100), np.int32)
        padded[0, : len(tokens)] = tokens
        best = np.argmax(forward(jnp.asarray(padded))[0], axis=-1)
        first = len(prompt)
        assert best[first : first + len(found.tokens)].tolist() == list(found.tokens)
        assert len(found.tokens) == 12 or found.tokens[-1] == TOKENIZER.eos_id


@pytest.mark.core
def test_prompts_together_give_what_each_gives_alone(model, greedy):
    for i, prompt in enumerate(PROMPTS):
        (alone,) = generate(model, TOKENIZER, [ids(prompt)], Sampling(max_tokens=12))
        assert alone == greedy[i]


def test_steps_padded_with_rows_of_nobody_give_the_same(greedy):
    """As GPUs run them: multiples of so many rows, and each layer by itself if asked for."""
    config = replace(SMALL, num_layers=2, vocab_size=258, max_length=100)
    padded = random_model(config, kernels=Kernels(unroll_decode=True, min_decode_rows=6))
    found = generate(padded, TOKENIZER, [ids(p) for p in PROMPTS], Sampling(max_tokens=12))
    assert found == greedy


def test_drawn_together_or_alone_is_the_same(model):
    samplings = [
        Sampling(max_tokens=10, temperature=1.0, seed=1),
        Sampling(max_tokens=3, temperature=0.8, top_k=20, seed=2),
        Sampling(max_tokens=10, temperature=1.0, top_p=0.9, seed=3),
        Sampling(max_tokens=6),
    ]
    prompts = [ids(p) for p in PROMPTS]
    together = generate(model, TOKENIZER, prompts, samplings)
    for prompt, sampling, found in zip(prompts, samplings, together, strict=True):
        (alone,) = generate(model, TOKENIZER, [prompt], sampling)
        assert alone == found
    again = generate(model, TOKENIZER, prompts, samplings)
    assert again == together
    others = [replace(s, seed=s.seed + 100) for s in samplings]
    assert generate(model, TOKENIZER, prompts, others)[0].tokens != together[0].tokens


def test_the_end_token_ends_one_sequence_and_not_the_others(model, greedy):
    class Ended(ByteTokenizer):
        """Ends a text with whatever the second prompt's third token is."""

        def __init__(self) -> None:
            super().__init__()
            self.eos_id = greedy[1].tokens[2]

    sampling = Sampling(max_tokens=12)
    found = generate(model, Ended(), [ids(p) for p in PROMPTS], sampling)
    end = Ended().eos_id
    for ended, whole in zip(found, greedy, strict=True):
        length = whole.tokens.index(end) + 1 if end in whole.tokens else 12
        assert ended.tokens == whole.tokens[:length]
        assert ended.finish == ("stop" if end in whole.tokens else "length")
    assert found[1].finish == "stop"


def test_max_tokens_of_one_is_one_token(model, greedy):
    found = generate(model, TOKENIZER, [ids(PROMPTS[2])], Sampling(max_tokens=1))
    assert found[0].tokens == greedy[2].tokens[:1]
    assert found[0].finish == "length"


def test_the_context_ends_a_text(model):
    found = generate(
        model, TOKENIZER, [ids(b"c" * 94), ids(b"d")], Sampling(max_tokens=20, temperature=1.0)
    )
    assert [len(one.tokens) for one in found] == [5, 20]
    assert found[0].finish == "length"


def test_streamed_pieces_are_the_text_and_hide_the_stop_string(model, greedy):
    text = greedy[2].text
    stop = text[3:6]
    pieces: list[tuple[int, str]] = []
    found = generate(
        model,
        TOKENIZER,
        [ids(p) for p in PROMPTS],
        Sampling(max_tokens=12, stop=(stop,)),
        on_text=lambda index, piece: pieces.append((index, piece)),
    )
    for i, one in enumerate(found):
        assert "".join(piece for index, piece in pieces if index == i) == one.text
        assert stop not in one.text
    assert found[2].text == text[: text.index(stop)]
    assert found[2].finish == "stop"


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[256, 1], []], "prompt 1: is empty"),
        ([[256] * 100], "prompt 0: its 100 tokens leave no room in model.max_length=100"),
        ([[256, 258]], "prompt 0: token 258 is outside model.vocab_size=258"),
        ([[256, -1]], "prompt 0: token -1 is outside model.vocab_size=258"),
    ],
)
def test_prompts_that_do_not_fit_are_named(model, prompts, message: str):
    with pytest.raises(ValueError, match=f"^{message}$"):
        generate(model, TOKENIZER, prompts, Sampling())


def test_no_prompts_give_nothing(model):
    assert generate(model, TOKENIZER, [], Sampling()) == []
    with pytest.raises(ValueError, match="sampling: 2 given for 1 prompts"):
        generate(model, TOKENIZER, [[256]], [Sampling(), Sampling()])


def test_a_prompt_of_nan_logits_is_named_and_stops_and_others_go_on(model, greedy):
    broken = nnx.clone(model)
    broken.embed.weight[...] = broken.embed.weight[...].at[ord("z")].set(jnp.nan)
    prompts = [*PROMPTS, b"z"]
    with pytest.warns(UserWarning, match="^prompt 4: stopped after 0 tokens: .* NaN"):
        found = generate(broken, TOKENIZER, [ids(p) for p in prompts], Sampling(max_tokens=12))
    assert found[:4] == greedy
    assert (found[4].tokens, found[4].finish) == ((), "error")
