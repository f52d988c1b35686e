"""Top-k, top-p and temperature against their meaning in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.inference.sampler import Sampling, SamplingArrays, sample

pytestmark = pytest.mark.core

_SAMPLE = jax.jit(sample)


def draw(logits_W: np.ndarray, sampling: Sampling, count: int) -> np.ndarray:
    """Draws many times from one distribution, each time with a seed of its own."""
    samplings = [Sampling(**(vars(sampling) | {"seed": seed})) for seed in range(count)]
    logits_BW = jnp.tile(jnp.asarray(logits_W, jnp.float32), (count, 1))
    return np.asarray(_SAMPLE(logits_BW, SamplingArrays.of(samplings), jnp.int32(0)))


def probabilities(logits_W: np.ndarray, sampling: Sampling) -> np.ndarray:
    """What the field means: temperature, then top-k, then top-p of what is left."""
    logits = logits_W.astype(np.float64) / sampling.temperature
    p = np.exp(logits - logits.max())
    p /= p.sum()
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
    return p


CASES = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.5),
    Sampling(temperature=2.0, top_k=4),
    Sampling(temperature=1.0, top_p=0.6),
    Sampling(temperature=1.5, top_k=6, top_p=0.7),
    Sampling(temperature=1.0, top_k=1),
    Sampling(temperature=1.0, top_p=1e-6),
    Sampling(temperature=1.0, top_k=1000),
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
    found = _SAMPLE(logits_BW, SamplingArrays.of(samplings), jnp.int32(7))
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
        together = _SAMPLE(logits_BW, SamplingArrays.of(samplings), jnp.int32(index))
        for i, sampling in enumerate(samplings):
            alone = _SAMPLE(logits_BW[i : i + 1], SamplingArrays.of([sampling]), jnp.int32(index))
            assert int(alone[0]) == int(together[i])


def test_draws_differ_from_token_to_token():
    logits_BW = jnp.zeros((1, 1000))
    arrays = SamplingArrays.of([Sampling(temperature=1.0, seed=3)])
    found = {int(_SAMPLE(logits_BW, arrays, jnp.int32(i))[0]) for i in range(20)}
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
    arrays = SamplingArrays.of([Sampling(**(vars(sampling) | {"seed": i})) for i in range(64)])
    assert _SAMPLE(logits_BW, arrays, jnp.int32(0), jnp.int32(3)).max() == 2


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_no_token_is_chosen_where_a_logit_is_not_finite(bad):
    logits_BW = jnp.array([[0.0, 1, 2], [0, bad, 2], [0, 1, bad]])
    arrays = SamplingArrays.of([Sampling(temperature=1.0)] * 3)
    tokens = _SAMPLE(logits_BW, arrays, jnp.int32(0), jnp.int32(2))
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
