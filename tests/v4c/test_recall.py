"""The recall task: distances are what they say, and only one sentence of a prompt answers the question."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from v4c.errors import InputError
from v4c.recall import KEYS, VALUES, Facts, question, sentence


def encode_words(text: str) -> list[int]:
    """A tokenizer of words: `` The``, `` otter``, `` likes``, `` plum`` and ``.`` are one token each."""
    known = {word: number for number, word in enumerate([" The", " likes", ".", *(f" {w}" for w in KEYS + VALUES)])}
    return [known[word] for word in text.replace(" ", "\n ").replace(".", "\n.").split("\n") if word]


FACTS = Facts.of(encode_words)
FILLER = np.arange(1000, 2000)


def test_words_differ() -> None:
    assert len(set(KEYS)) == len(KEYS) == 32
    assert len(set(VALUES)) == len(VALUES) == 32
    assert FACTS.statement(3, 5) == encode_words(sentence(KEYS[3], VALUES[5]))


@given(distance=st.integers(5, 950), seed=st.integers(0, 10**6), lead=st.sampled_from([(), (7777,)]))
def test_question(distance: int, seed: int, lead: tuple[int, ...]) -> None:
    asked = question(FACTS, FILLER, distance, np.random.default_rng(seed), lead)
    ids = asked.ids.tolist()
    assert asked.ids.dtype == np.int64
    assert tuple(ids[: len(lead)]) == lead
    opening = ids[-3:]
    starts = [place for place in range(len(ids) - 3) if ids[place : place + 3] == opening]
    assert len(starts) == 1  # no fact is stated twice
    assert ids[starts[0] + 3] == asked.answer
    assert len(ids) - (starts[0] + 3) == distance
    assert ids.count(asked.answer) == 1
    assert asked.answer in asked.choices
    stated = [token for token in ids if token in asked.choices.tolist()]
    assert len(stated) == len(set(stated)) >= 2
    if distance > 100:
        assert len(stated) >= 2 + distance // 48 * 0.5 or len(stated) > 16


def test_questions_follow_from_the_generator() -> None:
    first, second = (question(FACTS, FILLER, 99, np.random.default_rng(3), ()) for _ in range(2))
    assert np.array_equal(first.ids, second.ids)


def test_refusals() -> None:
    with pytest.raises(InputError, match="distance: expected at least 5 tokens, found 3"):
        question(FACTS, FILLER, 3, np.random.default_rng(0), ())
    with pytest.raises(InputError, match="filler: expected at least 24 tokens of text, found 5"):
        question(FACTS, FILLER[:5], 100, np.random.default_rng(0), ())
    with pytest.raises(InputError, match="values' first tokens differ"):
        Facts.of(lambda text: list(text.encode()))
