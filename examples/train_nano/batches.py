"""Training batches: running text, and texts full of facts and questions. A batch follows from seed and step alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from examples.train_nano.config import BOS
from v4c.recall import KEYS, VALUES, Facts

QUESTION_WEIGHT = 4.0
"""Of the loss at an asked value: few tokens are asked for, and they are what the compressed rows have to learn."""


@dataclass(frozen=True)
class Batch:
    """Token ids ``[B, S + 2]`` int64, of which ``[:, :S]`` is read; and by token, how much its prediction counts.

    `weights` ``[B, S + 2]`` float32: 0 where a fact is stated, for nothing says its value before, and at padding.
    """

    ids: np.ndarray
    weights: np.ndarray


class Batches:
    """Draws batches from a text.

    Args:
        text: ``[n]`` int64 token ids.
        facts: the recall task's sentences.
        seed: of all draws.
        recall_share: part of the sequences that are about recall.
    """

    def __init__(self, text: np.ndarray, facts: Facts, seed: int, recall_share: float = 0.5) -> None:
        self.text, self.facts, self.seed, self.recall_share = text, facts, seed, recall_share

    def draw(self, step: int, batch: int, length: int) -> Batch:
        """The batch of one step: ``[batch, length + 2]``."""
        rng = np.random.default_rng([self.seed, step])
        rows = [
            self._recall(rng, length + 2) if rng.random() < self.recall_share else self._plain(rng, length + 2)
            for _ in range(batch)
        ]
        return Batch(np.stack([ids for ids, _ in rows]), np.stack([weights for _, weights in rows]))

    def _plain(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        start = int(rng.integers(0, len(self.text) - length))
        ids = np.concatenate([[BOS], self.text[start : start + length - 1]])
        return ids, np.ones(length, np.float32)

    def _recall(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Pieces of text, facts at random places, and each fact asked for a few times, mostly far behind it.

        A third of the sequences hold many facts and little text, a third few facts.
        """
        count = int(rng.choice([4, 10, 24]))
        keys, values = rng.permutation(len(KEYS))[:count], rng.integers(0, len(VALUES), count)
        longest = int(rng.choice([4, 24, 64]))
        told: list[int] = []
        ids, weights = [BOS], [0.0]
        while len(ids) < length:
            piece = int(rng.integers(0, longest + 1))
            start = int(rng.integers(0, len(self.text) - longest))
            ids += self.text[start : start + piece].tolist()
            weights += [1.0] * piece
            new = len(told) < count and rng.random() < (0.75 if len(told) < count / 2 else 0.4)
            if new:
                fact = len(told)
                told.append(fact)
            elif told:
                fact = int(rng.choice(told))
            else:
                continue
            opening, value = self.facts.opening[keys[fact]], self.facts.values[values[fact]]
            ids += [*opening, *value, *self.facts.stop]
            weights += [0.2] * len(opening) + [0.0 if new else QUESTION_WEIGHT] * len(value)
            weights += [0.2] * len(self.facts.stop)
        return np.array(ids[:length], np.int64), np.array(weights[:length], np.float32)
