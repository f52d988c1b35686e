"""Many or uneven prompts compile few programs, and others like them none."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.data.tokenizer import ByteTokenizer
from dsjax.engine import generate
from dsjax.engine.compiled import _programs, forget_programs
from dsjax.inference.sampling import Sampling
from dsjax.model import DeepSeekV2
from tests.dsjax.engine.small_engine import compilations
from tests.small_models import SMALL, random_model

TOKENIZER = ByteTokenizer()


@pytest.fixture(scope="module")
def model() -> DeepSeekV2:
    config = replace(SMALL, num_layers=2, hidden_dim=16, vocab_size=258, max_length=2048)
    return random_model(config)


def prompts(lengths: list[int], seed: int) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    return [[TOKENIZER.bos_id, *draw.integers(0, 256, n - 1).tolist()] for n in lengths]


@pytest.mark.parametrize(
    ("lengths", "others", "programs"),
    [
        # 512 prompts of 64 tokens, and one of 8,000 beside 31 of 5, as small as keeps their kind.
        ([64] * 72, [57, 64, 61] * 25, 4),
        ([1000] + [5] * 15, [3] * 7 + [900] + [9] * 6, 5),
    ],
)
def test_many_or_uneven_prompts_compile_few_programs(model, lengths, others, programs: int):
    """Two steps that read prompts, long and usual ones, at most; one without, a choice, pages."""
    forget_programs()
    sampling = Sampling(max_tokens=2)
    with compilations() as first:
        found = generate(model, TOKENIZER, prompts(lengths, 0), sampling)
    assert [len(one.tokens) for one in found] == [2] * len(lengths)
    assert len(_programs) == programs
    assert programs <= len(first) <= programs + 8  # the rest copies and fills arrays
    with compilations() as again:
        generate(model, TOKENIZER, prompts(others, 1), sampling)
        assert not again
        jax.jit(lambda x: x + len(lengths))(jnp.zeros(3)).block_until_ready()
        assert again  # which shows that it would have been seen
