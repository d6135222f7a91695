"""Choosing the next token from logits: greedy, or at random with temperature, top-k, nucleus (top-p) and min-p."""

from __future__ import annotations

import math
from numbers import Real

import numpy as np

from v4c.errors import Error, InputError
from v4c.runtime.inputs import checked_count


class Sampler:
    """Chooses one token per row; two samplers with the same seed make the same choices from the same logits.

    Args:
        temperature: 0 takes the largest logit, the smaller id among equals; otherwise logits are divided by it.
        top_p: keep the smallest set of most likely tokens whose probability reaches this, above 0 and at most 1;
            among equally likely tokens the smaller ids are kept (Holtzman et al., 2020, section 3.1).
        seed: of the random numbers; None draws one from the system.
        top_k: keep this many of the most likely tokens, before ``top_p`` counts; 0 keeps all (Fan et al., 2018).
        min_p: keep tokens at least this many times as likely as the likeliest, 0 to 1 (Nguyen et al., 2024).

    Raises:
        InputError: a parameter is out of range.
    """

    def __init__(
        self,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        top_k: int = 0,
        min_p: float = 0.0,
    ) -> None:
        self._temperature = _number(temperature, "temperature")
        self._top_p = _number(top_p, "top_p")
        self._top_k = checked_count(top_k, "top_k", 0)
        self._min_p = _number(min_p, "min_p")
        if self._temperature < 0:
            raise InputError(f"temperature: expected at least 0, found {temperature}")
        if not 0 < self._top_p <= 1:
            raise InputError(f"top_p: expected above 0 and at most 1, found {top_p}")
        if not 0 <= self._min_p <= 1:
            raise InputError(f"min_p: expected 0 to 1, found {min_p}")
        if seed is not None:
            seed = checked_count(seed, "seed", 0)
        self._random = np.random.default_rng(seed)

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        """Token ids, int64 [B], for float32 logits [B, vocab]; a logit of -inf is never chosen.

        Raises:
            Error: a row has no finite largest logit (NaN, or nothing to choose from).
        """
        highest = logits.max(axis=-1)
        if not np.isfinite(highest).all():
            row = int(np.flatnonzero(~np.isfinite(highest))[0])
            raise Error(f"logits of row {row}: expected finite numbers, found {highest[row]}")
        if self._temperature == 0:
            return logits.argmax(axis=-1)
        return np.array([self._draw(row) for row in logits], dtype=np.int64)

    def _draw(self, logits: np.ndarray) -> int:
        with np.errstate(over="ignore"):  # to -inf at tiny temperatures, whose exponential is 0 as it should be
            weights = np.exp((logits.astype(np.float64) - float(logits.max())) / self._temperature)
        order = np.argsort(-weights, kind="stable")
        if self._top_k:
            order = order[: self._top_k]
        ranked = weights[order]
        cumulative = np.cumsum(ranked)
        kept = len(order)
        if self._top_p < 1:
            kept = int(np.searchsorted(cumulative, self._top_p * cumulative[-1])) + 1
        if self._min_p > 0:  # the likeliest weighs 1
            kept = min(kept, int(np.searchsorted(-ranked, -self._min_p, side="right")))
        cumulative = cumulative[:kept]
        return int(order[np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right")])


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Natural logarithms of the softmax of ``logits`` [V], float64."""
    shifted = logits.astype(np.float64) - float(logits.max())
    return shifted - np.log(np.exp(shifted).sum())


def most_likely(log_probs: np.ndarray, count: int) -> list[int]:
    """Ids of the ``count`` largest of ``log_probs`` [V], the largest first; of equal ones the smaller id first."""
    count = min(count, len(log_probs))
    if count == 0:
        return []
    bound = np.partition(log_probs, -count)[-count]
    ids = np.flatnonzero(log_probs >= bound)
    return [int(i) for i in ids[np.argsort(-log_probs[ids], kind="stable")][:count]]


def _number(value: float, name: str) -> float:
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
        raise InputError(f"{name}: expected a finite number, found {value!r}")
    return float(value)
