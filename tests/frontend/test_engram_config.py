"""Engram's derived constants: primes, offsets and multipliers, and what its config refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from v4c.errors import ConfigError
from v4c.frontend.config import EngramConfig
from v4c.frontend.presets import preset


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


@settings(deadline=None, max_examples=20)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=4, unique=True).map(sorted),
    st.integers(1, 5), st.integers(2, 5), st.integers(2, 3000), st.integers(0, 100),
)  # fmt: skip
def test_engram_constants(layers: list[int], heads: int, max_ngram: int, rows: int, seed: int) -> None:
    engram = EngramConfig(tuple(layers), heads, 8, rows, pad_id=0, seed=seed, max_ngram=max_ngram)
    primes = np.concatenate([engram.primes(layer) for layer in layers])
    assert primes.dtype == np.int64
    assert len(primes) == len(layers) * (max_ngram - 1) * heads
    # All primes from `rows` up to the last one, each exactly once.
    assert primes.tolist() == [number for number in range(rows, primes[-1] + 1) if _is_prime(number)]
    for layer in layers:
        ends = engram.offsets(layer) + engram.primes(layer)
        assert engram.offsets(layer).tolist() == [0, *ends[:-1]]
        assert ends[-1] == engram.table_size(layer)
        vocab = 1 + seed * 1000
        multipliers = engram.multipliers(layer, vocab)
        assert multipliers.shape == (max_ngram,)
        assert (multipliers % 2 == 1).all()
        assert all(int(multiplier) * (vocab - 1) < 2**63 for multiplier in multipliers)
        assert np.array_equal(multipliers, engram.multipliers(layer, vocab))
    if len(layers) > 1:
        assert not np.array_equal(engram.multipliers(layers[0], 1000), engram.multipliers(layers[1], 1000))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"layer_ids": ()}, "layer_ids"),
        ({"layer_ids": (2, 1)}, "layer_ids"),
        ({"layer_ids": (1, 1)}, "layer_ids"),
        ({"max_ngram": 1}, "max_ngram"),
        ({"kernel_size": 1}, "kernel_size"),
        ({"heads_per_ngram": 0}, "heads_per_ngram"),
        ({"table_rows": True}, "table_rows"),
        ({"seed": -1}, "seed"),
    ],
)
def test_engram_refusals(changes: dict[str, Any], named: str) -> None:
    engram = preset("v4-nano-engram").engram
    assert engram is not None
    with pytest.raises(ConfigError, match=rf"^engram\.{named}: expected"):
        replace(engram, **changes)


def test_engram_must_fit_the_model() -> None:
    config = preset("v4-nano-engram")
    assert config.engram is not None
    with pytest.raises(ConfigError, match=r"engram\.layer_ids: expected layers below 6, found 6"):
        replace(config, engram=replace(config.engram, layer_ids=(1, 6)))
    with pytest.raises(ConfigError, match=r"engram\.pad_id"):
        replace(config, engram=replace(config.engram, pad_id=4096))
    with pytest.raises(ConfigError, match="found layer 0"):
        config.engram.primes(0)
