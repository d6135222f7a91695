"""Sampling against the definitions: argmax, softmax with temperature, and the nucleus."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from v4c.errors import Error, InputError
from v4c.runtime.sampling import Sampler, log_probabilities, most_likely


def softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    exponents = np.exp((logits - logits.max()) / temperature)
    return exponents / exponents.sum()


@settings(deadline=None, max_examples=50)
@given(rows=st.lists(st.lists(st.integers(-2, 2), min_size=5, max_size=5), min_size=1, max_size=4))
def test_greedy_takes_the_smallest_of_the_largest(rows: list[list[int]]) -> None:
    found = Sampler()(np.array(rows, dtype=np.float32))
    assert found.tolist() == [row.index(max(row)) for row in rows]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_frequencies_follow_the_softmax(temperature: float) -> None:
    logits = np.array([0.3, -1.0, 2.0, 1.5, -np.inf], dtype=np.float32)
    draws = 20_000
    sampler = Sampler(temperature=temperature, seed=11)
    found = np.bincount(sampler(np.tile(logits, (draws, 1))), minlength=5) / draws
    expected = softmax(logits, temperature)
    assert found[4] == 0
    np.testing.assert_allclose(found, expected, atol=4.5 * np.sqrt(0.25 / draws))


@settings(deadline=None, max_examples=20)
@given(
    logits=st.lists(st.floats(-4, 4, width=32), min_size=2, max_size=12),
    top_p=st.floats(0.01, 1),
    temperature=st.floats(0.2, 4),
)
def test_the_nucleus_is_the_smallest_sufficient_set(logits: list[float], top_p: float, temperature: float) -> None:
    row = np.array(logits, dtype=np.float32)
    probabilities = softmax(row.astype(np.float64), temperature)
    order = sorted(range(len(row)), key=lambda token: (-probabilities[token], token))
    before = np.cumsum([0.0, *probabilities[order]])[:-1]  # mass of the tokens that come first
    surely = {token for token, mass in zip(order, before, strict=True) if mass < top_p - 1e-9}
    perhaps = {token for token, mass in zip(order, before, strict=True) if mass < top_p + 1e-9}
    found = set(Sampler(temperature, top_p, seed=1)(np.tile(row, (200, 1))).tolist())
    assert found <= perhaps
    assert found >= {token for token in surely if probabilities[token] > 0.15}


def test_a_tiny_nucleus_is_greedy() -> None:
    logits = np.random.default_rng(0).normal(size=(50, 30)).astype(np.float32)
    np.testing.assert_array_equal(Sampler(2.0, top_p=1e-9)(logits), logits.argmax(axis=1))


def test_a_seed_repeats_and_another_does_not() -> None:
    logits = np.zeros((40, 100), dtype=np.float32)
    first, again, other = (Sampler(1.0, seed=seed)(logits).tolist() for seed in (5, 5, 6))
    assert first == again
    assert first != other
    assert Sampler(1.0)(logits).tolist() != Sampler(1.0)(logits).tolist()


def test_tiny_temperatures_do_not_overflow() -> None:
    logits = np.array([[1e30, -1e30, 3.0]], dtype=np.float32)
    assert Sampler(1e-300, seed=0)(logits).tolist() == [0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_broken_logits_are_named(bad: float, temperature: float) -> None:
    logits = np.zeros((3, 4), dtype=np.float32)
    logits[1, 2] = bad
    with pytest.raises(Error, match=r"logits of row 1: expected finite numbers, found"):
        Sampler(temperature)(logits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -0.1}, "temperature: expected at least 0, found -0.1"),
        ({"temperature": float("nan")}, "temperature: expected a finite number, found nan"),
        ({"temperature": "1"}, "temperature: expected a finite number, found '1'"),
        ({"top_p": 0.0}, "top_p: expected above 0 and at most 1, found 0.0"),
        ({"top_p": 1.1}, "top_p: expected above 0 and at most 1, found 1.1"),
        ({"top_p": True}, "top_p: expected a finite number, found True"),
        ({"seed": -1}, "seed: expected an integer of at least 0, found -1"),
        ({"seed": 1.5}, "seed: expected an integer of at least 0, found 1.5"),
    ],
)
def test_bad_parameters_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        Sampler(**arguments)
    assert str(caught.value) == message


@settings(deadline=None, max_examples=30)
@given(
    logits=st.lists(st.integers(-3, 3), min_size=2, max_size=10),
    top_k=st.integers(0, 11),
    min_p=st.sampled_from([0.0, 0.04, 0.2, 0.6, 1.0]),
    temperature=st.floats(0.3, 4),
)
def test_top_k_and_min_p_keep_what_they_say(logits: list[int], top_k: int, min_p: float, temperature: float) -> None:
    row = np.array(logits, dtype=np.float32)
    probabilities = softmax(row.astype(np.float64), temperature)
    order = sorted(range(len(row)), key=lambda token: (-probabilities[token], token))[: top_k or None]
    surely = {token for token in order if probabilities[token] > min_p * probabilities.max() * (1 + 1e-9)}
    perhaps = {token for token in order if probabilities[token] > min_p * probabilities.max() * (1 - 1e-9)}
    found = set(Sampler(temperature, seed=2, top_k=top_k, min_p=min_p)(np.tile(row, (300, 1))).tolist())
    assert found <= perhaps
    assert found >= {token for token in surely if probabilities[token] > 0.15}


def test_top_k_counts_before_top_p() -> None:
    logits = np.log(np.array([[0.4, 0.3, 0.2, 0.1]], dtype=np.float32)).repeat(400, axis=0)
    # Of the two likeliest, 0.4 / 0.7 = 0.57 is the first one's share: enough for 0.5, too little for 0.6.
    assert set(Sampler(1.0, top_p=0.5, seed=0, top_k=2)(logits).tolist()) == {0}
    assert set(Sampler(1.0, top_p=0.6, seed=0, top_k=2)(logits).tolist()) == {0, 1}


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=9), st.integers(0, 12))
def test_log_probabilities_and_the_likeliest(logits: list[int], count: int) -> None:
    row = np.array(logits, dtype=np.float32)
    log_probs = log_probabilities(row)
    np.testing.assert_allclose(np.exp(log_probs), softmax(row.astype(np.float64), 1.0), rtol=1e-12)
    assert most_likely(log_probs, count) == sorted(range(len(row)), key=lambda t: (-row[t], t))[:count]
