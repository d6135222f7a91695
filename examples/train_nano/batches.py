"""Training batches: running text, and texts full of facts and questions. A batch follows from seed and step alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from examples.train_nano.config import BOS
from v4c.recall import KEYS, VALUES, Facts

QUESTION_WEIGHT = 4.0
"""Of the loss at a value that is asked for from beyond the window: what only compressed rows can answer."""
_NEAR_WEIGHT = 0.5  # asked from within the window: soon learnt
_TEXT_WEIGHT = 0.2  # of text between facts: torn pieces
_SENTENCE_WEIGHT = 0.05  # of a fact's other words


@dataclass(frozen=True)
class Batch:
    """Token ids ``[B, S + 2]`` int64, of which ``[:, :S]`` is read; and by token, how much its prediction counts.

    `weights` ``[B, S + 2]`` float32: 0 where a value is told, for nothing says it before.
    """

    ids: np.ndarray
    weights: np.ndarray


class Batches:
    """Draws batches from a text.

    Args:
        text: ``[n]`` int64 token ids.
        facts: the recall task's sentences.
        seed: of all draws.
        window: tokens that a question within reach of the sliding window lies behind its fact at most.
    """

    def __init__(self, text: np.ndarray, facts: Facts, seed: int, window: int) -> None:
        self.text, self.facts, self.seed, self.window = text, facts, seed, window

    def draw(self, step: int, batch: int, length: int, recall_share: float) -> Batch:
        """The batch of one step: ``[batch, length + 2]``.

        With a `recall_share` of 1 there is next to no text between the facts; below, sequences differ in how many facts
        they hold and how much text lies between.
        """
        rng = np.random.default_rng([self.seed, step])
        dense = recall_share == 1
        rows = []
        for _ in range(batch):
            if rng.random() >= recall_share:
                rows.append(self._plain(rng, length + 2))
            elif dense:
                rows.append(self._recall(rng, length + 2, int(rng.choice([8, 16])), 2))
            else:
                rows.append(self._recall(rng, length + 2, int(rng.choice([6, 14, 28])), int(rng.choice([2, 16, 48]))))
        return Batch(np.stack([ids for ids, _ in rows]), np.stack([weights for _, weights in rows]))

    def _plain(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        start = int(rng.integers(0, len(self.text) - length))
        ids = np.concatenate([[BOS], self.text[start : start + length - 1]])
        return ids, np.ones(length, np.float32)

    def _recall(
        self, rng: np.random.Generator, length: int, count: int, longest: int
    ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
        """`count` facts at random places, pieces of text of up to `longest` tokens, and questions for facts told
        before, mostly from beyond the window."""
        keys, values = rng.permutation(len(KEYS))[:count], rng.integers(0, len(VALUES), count)
        places: list[int] = []  # where each fact that was told stood last
        ids, weights = [BOS], [0.0]
        while len(ids) < length:
            piece = int(rng.integers(0, longest + 1))
            start = int(rng.integers(0, len(self.text) - longest))
            ids += self.text[start : start + piece].tolist()
            weights += [_TEXT_WEIGHT] * piece
            new = len(places) < count and (not places or rng.random() < 0.4)
            if new:
                fact, weight = len(places), 0.0
                places.append(0)
            else:
                far = [number for number, place in enumerate(places) if len(ids) - place > self.window]
                fact = int(rng.choice(far)) if far and rng.random() < 0.9 else int(rng.integers(0, len(places)))
                weight = QUESTION_WEIGHT if len(ids) - places[fact] > self.window else _NEAR_WEIGHT
            opening, value = self.facts.opening[keys[fact]], self.facts.values[values[fact]]
            places[fact] = len(ids)
            ids += [*opening, *value, *self.facts.stop]
            weights += [_SENTENCE_WEIGHT] * len(opening) + [weight] * len(value)
            weights += [_SENTENCE_WEIGHT] * len(self.facts.stop)
        return np.array(ids[:length], np.int64), np.array(weights[:length], np.float32)
