"""What Engram adds to a model: on which layers, how n-grams are hashed, and how large the tables are.

Everything the hash needs (primes, row offsets, multipliers) is derived from these few numbers, so two readers of one
config agree on every table row (arXiv 2601.07372, sections 2.2 and 2.3).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from v4c.errors import ConfigError

_LAYER_SEED_STEP = 10007
"""Spreads one seed over layers, as in the paper's reference code."""

_RANGES = {
    "heads_per_ngram": (1, 1024),
    "embed_dim": (1, 2**20),
    "table_rows": (2, 2**31 - 1),
    "pad_id": (0, 2**31 - 1),
    "seed": (0, 2**31 - 1),
    "max_ngram": (2, 16),
    "kernel_size": (2, 64),
}


@lru_cache
def _primes_from(start: int, count: int) -> tuple[int, ...]:
    """The first `count` primes that are not below `start`."""
    found: list[int] = []
    candidate = max(start, 2)
    while len(found) < count:
        limit = int(candidate**0.5) + 1
        divisors = np.arange(2, limit + 1)
        if not (candidate % divisors[divisors < candidate] == 0).any():
            found.append(candidate)
        candidate += 1
    return tuple(found)


@dataclass(frozen=True)
class EngramConfig:
    """Engram's sizes. n-grams of 2 to `max_ngram` tokens are each hashed by `heads_per_ngram` heads.

    Attributes:
        layer_ids: ascending layers that have an Engram in front of their attention.
        heads_per_ngram: hash heads per n-gram length.
        embed_dim: width of one table row, that is, of one head.
        table_rows: smallest number of rows per head; each head's row count is a prime not below it.
        pad_id: token id that stands before the first token; it goes through the lookup table like any other.
        seed: of the hash multipliers.
        max_ngram: longest n-gram, and the dilation of the convolution.
        kernel_size: taps of the depthwise convolution.
    """

    layer_ids: tuple[int, ...]
    heads_per_ngram: int
    embed_dim: int
    table_rows: int
    pad_id: int
    seed: int = 0
    max_ngram: int = 3
    kernel_size: int = 4

    def __post_init__(self) -> None:
        for key, (minimum, maximum) in _RANGES.items():
            value = getattr(self, key)
            if type(value) is not int or not minimum <= value <= maximum:
                raise ConfigError(f"engram.{key}: expected an integer from {minimum} to {maximum}, found {value!r}")
        ascending = sorted(set(self.layer_ids))
        if not ascending or list(self.layer_ids) != ascending or ascending[0] < 0:
            raise ConfigError(f"engram.layer_ids: expected ascending layer numbers, found {list(self.layer_ids)}")

    @property
    def num_addresses(self) -> int:
        """T: table rows read per token and layer."""
        return (self.max_ngram - 1) * self.heads_per_ngram

    @property
    def embedding_width(self) -> int:
        """T * e: width of the concatenated rows."""
        return self.num_addresses * self.embed_dim

    @property
    def dilation(self) -> int:
        """Distance in tokens between two taps of the convolution."""
        return self.max_ngram

    def primes(self, layer: int) -> np.ndarray:
        """``[T]`` int64: rows of each head's table, n-gram length major; no prime serves twice in the whole model."""
        first = self._place(layer) * self.num_addresses
        every = _primes_from(self.table_rows, len(self.layer_ids) * self.num_addresses)
        return np.array(every[first : first + self.num_addresses], dtype=np.int64)

    def offsets(self, layer: int) -> np.ndarray:
        """``[T]`` int64: first row of each head in the layer's one table."""
        primes = self.primes(layer)
        return np.cumsum(primes) - primes

    def table_size(self, layer: int) -> int:
        """Rows of the layer's table: the sum of its primes."""
        return int(self.primes(layer).sum())

    def multipliers(self, layer: int, vocab: int) -> np.ndarray:
        """``[max_ngram]`` int64: odd, and small enough that no product with an id below `vocab` overflows."""
        self._place(layer)
        bound = max(1, np.iinfo(np.int64).max // vocab // 2)
        generator = np.random.default_rng(self.seed + _LAYER_SEED_STEP * layer)
        return generator.integers(0, bound, self.max_ngram, dtype=np.int64) * 2 + 1

    def _place(self, layer: int) -> int:
        if layer not in self.layer_ids:
            raise ConfigError(f"engram: expected one of the layers {list(self.layer_ids)}, found layer {layer}")
        return self.layer_ids.index(layer)
