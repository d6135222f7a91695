"""The recall task: a fact stated once in a text, asked for hundreds of tokens later.

A fact is a sentence, ``The otter likes plum.``, and to ask is to begin it again: the model has to go on with the value.
Key and value are random, so nothing but the earlier sentence says which value is right, and a model that sees only its
sliding window guesses among `VALUES`. Sentences lie between pieces of running text; the distance is counted in tokens
from the value that was stated to the one that is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from v4c.errors import InputError

KEYS = (
    "ant", "badger", "bear", "beaver", "camel", "cat", "cow", "crab", "crow", "deer", "dog", "eagle", "falcon", "fox",
    "frog", "goat", "goose", "hare", "horse", "lion", "lizard", "mole", "moose", "mouse", "otter", "owl", "panda",
    "rabbit", "raven", "seal", "tiger", "whale",
)  # fmt: skip
VALUES = (
    "amber", "apple", "barley", "bread", "butter", "cheese", "cherry", "clover", "copper", "coral", "cotton", "garlic",
    "ginger", "gold", "honey", "ivory", "lemon", "linen", "marble", "melon", "mint", "olive", "onion", "pearl",
    "pepper", "plum", "rice", "silk", "silver", "sugar", "velvet", "wool",
)  # fmt: skip
CHANCE = 1 / len(VALUES)
DISTANCES = (24, 64, 128, 256, 512, 900)
"""Distances that `v4c eval` asks at; the first lies within a window of 32 tokens, the others beyond."""

Encode = Callable[[str], Sequence[int]]


def sentence(key: str, value: str) -> str:
    """The fact, as it stands in a text."""
    return f" The {key} likes {value}."


@dataclass(frozen=True)
class Facts:
    """The sentences' token ids in one tokenizer.

    Attributes:
        opening: by key, the ids up to the value.
        values: by value, its ids; the first one is the answer.
        stop: ids after the value.
    """

    opening: tuple[tuple[int, ...], ...]
    values: tuple[tuple[int, ...], ...]
    stop: tuple[int, ...]

    @classmethod
    def of(cls, encode: Encode) -> Facts:
        """Encode every part on its own, as a byte-level tokenizer would within the sentence.

        Raises:
            InputError: two values begin with the same token, so an answer could not be told from another.
        """
        facts = cls(
            tuple(tuple(encode(f" The {key} likes")) for key in KEYS),
            tuple(tuple(encode(f" {value}")) for value in VALUES),
            tuple(encode(".")),
        )
        if len({value[0] for value in facts.values}) < len(VALUES):
            raise InputError("recall: expected a tokenizer in which the values' first tokens differ, found equal ones")
        return facts

    def statement(self, key: int, value: int) -> list[int]:
        """Ids of the whole sentence."""
        return [*self.opening[key], *self.values[value], *self.stop]


@dataclass(frozen=True)
class Question:
    """One prompt; a model recalls when the likeliest next token is `answer`.

    Attributes:
        ids: ``[S]`` int64.
        answer: token id.
        choices: the first token of every value.
    """

    ids: np.ndarray
    answer: int
    choices: np.ndarray


def question(
    facts: Facts, filler: np.ndarray, distance: int, rng: np.random.Generator, lead: tuple[int, ...]
) -> Question:
    """A prompt that asks for a fact stated `distance` tokens before.

    Args:
        facts: the sentences.
        filler: ``[n]`` int64, running text to cut pieces from.
        distance: tokens from the stated value to the asked one.
        rng: draws keys, values, pieces and places.
        lead: ids that begin every text, such as the begin-of-text token.

    Returns:
        A prompt of some `distance` + 40 tokens. One other fact stands before the asked one, and one more for every 48
        tokens of distance between fact and question; no fact is stated twice. So finding any fact is not enough.

    Raises:
        InputError: `distance` is too short to begin the sentence again, or `filler` is shorter than a piece.
    """
    keys, values = rng.permutation(len(KEYS)), rng.permutation(len(VALUES))
    key, value = int(keys[0]), int(values[0])
    opening, told = list(facts.opening[key]), facts.statement(key, value)
    rest = distance - len(facts.values[value]) - len(facts.stop) - len(opening)  # value to value, less what is fixed
    if rest < 0:
        raise InputError(f"distance: expected at least {distance - rest} tokens, found {distance}")
    others = [facts.statement(int(k), int(v)) for k, v in zip(keys[1:], values[1:], strict=True)]
    before = [*_piece(filler, 24, rng), *others[0]]
    between = _interleave(filler, others[1 : 1 + min(len(others) - 1, distance // 48)], rest, rng)
    ids = [*lead, *before, *told, *between, *opening]
    return Question(
        np.array(ids, np.int64), facts.values[value][0], np.array([value[0] for value in facts.values], np.int64)
    )


def _piece(filler: np.ndarray, length: int, rng: np.random.Generator) -> list[int]:
    if len(filler) < length:
        raise InputError(f"filler: expected at least {length} tokens of text, found {len(filler)}")
    start = int(rng.integers(0, len(filler) - length + 1))
    return filler[start : start + length].tolist()


def _interleave(filler: np.ndarray, sentences: list[list[int]], length: int, rng: np.random.Generator) -> list[int]:
    """`sentences` in between pieces of text, `length` tokens in all; sentences that do not fit are left out."""
    while sum(map(len, sentences)) > length:
        sentences = sentences[:-1]
    free = length - sum(map(len, sentences))
    cuts = np.diff([0, *sorted(rng.integers(0, free + 1, len(sentences)).tolist()), free])
    out: list[int] = []
    for cut, told in zip(cuts[:-1], sentences, strict=True):
        out += [*_piece(filler, int(cut), rng), *told]
    return [*out, *_piece(filler, int(cuts[-1]), rng)]
