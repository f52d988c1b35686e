"""How tokens are chosen, against what each field means in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.inference.sampler import (
    LogitChanges,
    SamplingArrays,
    allowed_bits,
    log_probs,
    pack,
    sample,
)
from dsjax.inference.sampling import Sampling

pytestmark = pytest.mark.core

_SAMPLE = jax.jit(sample)


def arrays_of(samplings: list[Sampling], index: int = 0) -> SamplingArrays:
    """The samplings of a batch, each for the `index`-th token after an empty prompt."""
    rows = [pack(sampling, sampling.key(()), index) for sampling in samplings]
    return SamplingArrays.unpack(jnp.asarray(np.stack(rows)))


def draw(logits_W: np.ndarray, sampling: Sampling, count: int) -> np.ndarray:
    """Draws many times from one distribution, each time with a seed of its own."""
    samplings = [Sampling(**(vars(sampling) | {"seed": seed})) for seed in range(count)]
    logits_BW = jnp.tile(jnp.asarray(logits_W, jnp.float32), (count, 1))
    return np.asarray(_SAMPLE(logits_BW, arrays_of(samplings)))


def probabilities(logits_W: np.ndarray, sampling: Sampling) -> np.ndarray:
    """What the field means: temperature, then top-k, then top-p of what is left."""
    logits = logits_W.astype(np.float64) / sampling.temperature
    p = np.exp(logits - logits.max())
    p /= p.sum()
    first = p.copy()
    order = np.argsort(-p, kind="stable")
    if sampling.top_k:
        p[order[sampling.top_k :]] = 0
        p /= p.sum()
    if sampling.top_p < 1:
        kept, mass = [], 0.0
        for token in order:
            if mass >= sampling.top_p:
                break
            kept.append(token)
            mass += p[token]
        p = np.where(np.isin(np.arange(len(p)), kept), p, 0)
        p /= p.sum()
    p = np.where(first >= sampling.min_p * first.max(), p, 0)
    return p / p.sum()


CASES = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.5),
    Sampling(temperature=2.0, top_k=4),
    Sampling(temperature=1.0, top_p=0.6),
    Sampling(temperature=1.5, top_k=6, top_p=0.7),
    Sampling(temperature=1.0, top_k=1),
    Sampling(temperature=1.0, top_p=1e-6),
    Sampling(temperature=1.0, top_k=1000),
    Sampling(temperature=1.0, min_p=0.3),
    Sampling(temperature=2.0, top_k=7, top_p=0.9, min_p=0.2),
]


@pytest.mark.parametrize("sampling", CASES)
def test_draws_follow_the_distribution(rng, sampling: Sampling):
    logits = rng.standard_normal(12) * 1.5
    count = 4000
    found = np.bincount(draw(logits, sampling, count), minlength=12) / count
    expected = probabilities(logits, sampling)
    assert np.all(found[expected == 0] == 0)
    error = np.sqrt(expected * (1 - expected) / count)
    np.testing.assert_array_less(np.abs(found - expected), 4.5 * error + 1e-9)


def test_equal_logits_keep_no_more_than_top_k():
    found = draw(np.zeros(10), Sampling(temperature=1.0, top_k=3), 500)
    assert set(found) == {0, 1, 2}


def test_temperature_0_takes_the_best_whatever_else_is_set(rng):
    logits_BW = jnp.asarray(rng.standard_normal((3, 20)), jnp.float32)
    samplings = [Sampling(seed=i, top_k=5, top_p=0.5) for i in range(3)]
    found = _SAMPLE(logits_BW, arrays_of(samplings, 7))
    np.testing.assert_array_equal(found, np.argmax(logits_BW, axis=-1))


def test_a_draw_depends_on_nothing_else_of_the_batch(rng):
    logits_BW = jnp.asarray(rng.standard_normal((4, 50)), jnp.float32)
    samplings = [
        Sampling(temperature=1.0, seed=5),
        Sampling(),
        Sampling(temperature=0.7, top_k=9, seed=2**31 + 11),
        Sampling(temperature=1.0, top_p=0.9, seed=5),
    ]
    for index in range(6):
        together = _SAMPLE(logits_BW, arrays_of(samplings, index))
        for i, sampling in enumerate(samplings):
            alone = _SAMPLE(logits_BW[i : i + 1], arrays_of([sampling], index))
            assert int(alone[0]) == int(together[i])


def test_draws_differ_from_token_to_token():
    logits_BW = jnp.zeros((1, 1000))
    one = [Sampling(temperature=1.0, seed=3)]
    found = {int(_SAMPLE(logits_BW, arrays_of(one, i))[0]) for i in range(20)}
    assert len(found) > 15


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("stop", ("",)),
        ("seed", -1),
    ],
)
def test_what_cannot_be_is_refused(field: str, value):
    with pytest.raises(ValueError, match=f"^{field}="):
        Sampling(**{field: value})


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(temperature=1.0), Sampling(temperature=1.0, top_k=5, top_p=0.9)],
)
def test_ids_past_the_tokenizer_are_never_chosen(sampling):
    logits_BW = jnp.tile(jnp.array([0.0, 1, 2, 9, 9, 9]), (64, 1))
    arrays = arrays_of([Sampling(**(vars(sampling) | {"seed": i})) for i in range(64)])
    assert _SAMPLE(logits_BW, arrays, known_W=jnp.arange(6) < 3).max() == 2
    holes = jnp.array([True, False, True, False, False, False])
    assert set(np.asarray(_SAMPLE(logits_BW, arrays, known_W=holes))) <= {0, 2}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_no_token_is_chosen_where_a_logit_is_not_finite(bad):
    logits_BW = jnp.array([[0.0, 1, 2], [0, bad, 2], [0, 1, bad]])
    arrays = arrays_of([Sampling(temperature=1.0)] * 3)
    tokens = _SAMPLE(logits_BW, arrays, known_W=jnp.arange(3) < 2)
    assert (np.asarray(tokens) < 0).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 2.5),
        ("max_tokens", True),
        ("seed", 1.5),
        ("top_k", 3_000_000_000),
        ("top_k", 1.0),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "1"),
        ("top_p", None),
        ("stop", 3),
        ("stop", ["a", 3]),
        ("stop", ""),
    ],
)
def test_a_wrong_option_is_one_line_that_names_it(field, value):
    with pytest.raises(ValueError, match=f"^{field}=") as error:
        Sampling(**{field: value})
    assert "\n" not in str(error.value)


def test_one_stop_string_is_not_its_characters():
    assert Sampling(stop="\n\n").stop == ("\n\n",)  # type: ignore[arg-type]
    assert Sampling(stop=None).stop == ()  # type: ignore[arg-type]
    assert Sampling(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]


def test_equal_probabilities_keep_as_many_as_top_p_takes():
    found = draw(np.zeros(10), Sampling(temperature=1.0, top_p=0.35), 800)
    assert set(found) == {0, 1, 2, 3}


def test_what_top_p_keeps_of_a_large_table_is_what_sorting_keeps(rng):
    """Over 20,000 tokens, where no logit is far above the others."""
    logits_BW = rng.standard_normal((3, 20_000)).astype(np.float32)
    for top_k, top_p in ((0, 0.5), (50, 1.0), (300, 0.8), (1, 0.9)):
        sampling = Sampling(temperature=0.8, top_k=top_k, top_p=top_p)
        many = [Sampling(**(vars(sampling) | {"seed": seed})) for seed in range(3)]
        tokens = np.asarray(_SAMPLE(jnp.asarray(logits_BW), arrays_of(many)))
        for row, token in zip(logits_BW, tokens, strict=True):
            assert probabilities(row, sampling)[token] > 0


def changes_of(sampling: Sampling, prompt: list[int], text: list[int], size: int) -> LogitChanges:
    counts = 2 * np.bincount(text, minlength=size).astype(np.int32)
    counts[np.asarray(prompt, int)] |= 1
    allowed, ids, bias = LogitChanges.host_arrays(1, size)
    if sampling.allowed_tokens is not None:
        allowed[0] = allowed_bits(np.asarray(sampling.allowed_tokens), size)
    for at, (token, value) in enumerate(sampling.logit_bias.items()):
        ids[0, at], bias[0, at] = token, value
    return LogitChanges(*map(jnp.asarray, (counts[None], allowed, ids, bias)))


def changed_logits(logits, sampling: Sampling, prompt: list[int], text: list[int]):
    """What the fields mean, token by token."""
    found = []
    for token, logit in enumerate(logits):
        allowed = sampling.allowed_tokens is None or token in sampling.allowed_tokens
        logit = logit + sampling.logit_bias.get(token, 0) if allowed else -np.inf
        if token in prompt + text:
            r = sampling.repetition_penalty
            logit = logit / r if logit > 0 else logit * r
        logit -= sampling.frequency_penalty * text.count(token)
        logit -= sampling.presence_penalty * (token in text)
        found.append(logit)
    return found


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(repetition_penalty=1.7),
        Sampling(presence_penalty=0.8),
        Sampling(frequency_penalty=-0.6),
        Sampling(logit_bias={3: 2.5, 39: -1.0, 7: 1e9}),
        Sampling(allowed_tokens=(2, 5, 33, 39)),
        Sampling(
            repetition_penalty=0.6,
            presence_penalty=-0.5,
            frequency_penalty=0.3,
            logit_bias={1: 1.0, 33: 4.0},
            allowed_tokens=(1, 2, 5, 33, 39),
        ),
    ],
)
def test_penalties_bias_and_masks_change_the_best_token(rng, sampling: Sampling):
    for _ in range(20):
        logits = rng.standard_normal(40).astype(np.float32)
        prompt = rng.integers(0, 40, 8).tolist()
        text = rng.integers(0, 40, 12).tolist()
        found = _SAMPLE(
            jnp.asarray(logits)[None], arrays_of([sampling]), changes_of(sampling, prompt, text, 40)
        )
        assert int(found[0]) == int(np.argmax(changed_logits(logits, sampling, prompt, text)))


def test_log_probabilities_are_the_models_own(rng):
    logits = rng.standard_normal((2, 50)).astype(np.float32)
    known = np.arange(50) < 45
    found = log_probs(jnp.asarray(logits), jnp.array([3, 44]), jnp.asarray(known))
    want = logits[:, :45] - np.log(np.exp(logits[:, :45]).sum(-1, keepdims=True))
    np.testing.assert_allclose(found.chosen_B, [want[0, 3], want[1, 44]], rtol=1e-5)
    order = np.argsort(-want, axis=-1)[:, :20]
    np.testing.assert_array_equal(found.best_ids_BK, order)
    np.testing.assert_allclose(found.best_BK, np.take_along_axis(want, order, -1), rtol=1e-5)


def test_other_prompts_seeds_and_samples_have_other_keys():
    one = Sampling(seed=1)
    keys = [one.key((1, 2)), one.key((1, 3)), one.key((1, 2), 1), Sampling(seed=2).key((1, 2))]
    assert len({tuple(key) for key in keys}) == 4
    assert tuple(one.key([1, 2])) == tuple(one.key((1, 2)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("min_p", 1.5),
        ("repetition_penalty", 0),
        ("presence_penalty", float("inf")),
        ("frequency_penalty", "1"),
        ("logit_bias", [1]),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: float("nan")}),
        ("logit_bias", dict.fromkeys(range(400), 1.0)),
        ("allowed_tokens", ()),
        ("allowed_tokens", "ab"),
        ("stop_tokens", (1.5,)),
        ("logprobs", 21),
        ("prompt_logprobs", -1),
    ],
)
def test_a_wrong_change_of_logits_is_one_line_that_names_it(field, value):
    with pytest.raises(ValueError, match=f"^{field}=") as error:
        Sampling(**{field: value})
    assert "\n" not in str(error.value)
