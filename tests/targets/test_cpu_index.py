"""The LightningIndex kernel: exact order on small integers, agreement by score margin on real numbers, selection."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.targets.cpu_harness import compiled, run
from v4c.custom_ops.lightning_index import lightning_index as torch_reference
from v4c.targets.cpu.kernels.index import lightning_index

RATIO = 4
CONFIGS = [(1, 8, 3), (16, 24, 5), (5, 7, 40), (33, 16, 300), (80, 8, 4), (64, 16, 512)]  # heads, width, top_k
SEEDS = st.integers(0, 2**32 - 1)


def choose(config: tuple[int, int, int], q: np.ndarray, weights: np.ndarray, rows: np.ndarray, positions: np.ndarray,
           lengths: np.ndarray) -> np.ndarray:  # fmt: skip
    """The kernel's indices; rows that are not ready and tokens that are padding are NaN."""
    heads, width, top_k = config
    q, weights, rows = q.copy(), weights.copy(), rows.copy()
    for i, n in enumerate(lengths):
        rows[i, (positions[i] + n) // RATIO :] = np.nan
        q[i, n:], weights[i, n:] = np.nan, np.nan
    kernel = compiled(lightning_index, heads, width, RATIO, top_k)
    return run(kernel, [q, weights, rows, positions, lengths], [((*q.shape[:2], top_k), "int64")]).outputs[0]


def scores_reference(q: np.ndarray, weights: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Scores of one token, up to a positive factor, head by head in float64."""
    scores = np.zeros(len(rows))
    for h in range(len(q)):
        scores += weights[h] * np.maximum(rows.astype(np.float64) @ q[h], 0)
    return scores


def best_reference(scores: np.ndarray, top_k: int) -> np.ndarray:
    order = sorted(range(len(scores)), key=lambda row: (-scores[row], row))[:top_k]
    return np.array(order + [-1] * (top_k - len(order)))


@settings(deadline=None, max_examples=50)
@given(
    config=st.sampled_from(CONFIGS),
    batch=st.integers(1, 3),
    around=st.sampled_from([0, 4, 60, 1200, 2048, 8000]),
    chunk=st.sampled_from([1, 2, 7, 18]),
    values=st.sampled_from([1, 3]),
    seed=SEEDS,
)
def test_order_and_ties(
    config: tuple[int, int, int], batch: int, around: int, chunk: int, values: int, seed: int
) -> None:
    """Small integers: sums are exact, ties are many, and the whole order is determined."""
    heads, width, top_k = config
    rng = np.random.default_rng(seed)
    positions = np.maximum(around + rng.integers(-1, 2, batch), 0)
    lengths = rng.integers(0, chunk + 1, batch)
    q, weights, rows = (
        rng.integers(-values, values + 1, shape).astype(np.float32)
        for shape in (
            (batch, chunk, heads, width),
            (batch, chunk, heads),
            (batch, max(1, (positions + lengths).max() // RATIO), width),
        )
    )
    out = choose(config, q, weights, rows, positions, lengths)
    for i, j in np.ndindex(batch, chunk):
        ready = (positions[i] + j + 1) // RATIO if j < lengths[i] else 0
        scores = scores_reference(q[i, j], weights[i, j], rows[i, :ready])
        np.testing.assert_array_equal(out[i, j], best_reference(scores, top_k))


@pytest.mark.parametrize("config", CONFIGS)
def test_real_scores_are_chosen_within_rounding(config: tuple[int, int, int]) -> None:
    heads, width, top_k = config
    rng = np.random.default_rng()
    q = rng.standard_normal((2, 3, heads, width), dtype=np.float32)
    weights = rng.standard_normal((2, 3, heads), dtype=np.float32)
    rows = rng.standard_normal((2, 900, width), dtype=np.float32)
    positions, lengths = np.array([1201, 3590]), np.array([3, 2])
    out = choose(config, q, weights, rows, positions, lengths)
    tensors = map(torch.from_numpy, (q, weights, rows, positions, lengths))
    reference = torch_reference(*tensors, RATIO, top_k).numpy()
    for i, n in enumerate(lengths):
        for j in range(n):
            ready = (positions[i] + j + 1) // RATIO
            scores = scores_reference(q[i, j], weights[i, j], rows[i, :ready])
            chosen = out[i, j][out[i, j] >= 0]
            assert len(chosen) == len(set(chosen)) == min(top_k, ready)
            slack = 1e-5 * np.abs(scores).max()
            assert np.all(np.diff(scores[chosen]) <= slack)
            left = np.delete(scores, chosen)
            assert not len(left) or left.max() <= scores[chosen].min() + slack
            np.testing.assert_allclose(scores[chosen], scores[reference[i, j][: len(chosen)]], atol=slack)


@pytest.mark.parametrize("order", ["ascending", "descending", "equal", "negative"])
@pytest.mark.parametrize("top_k", [1, 8, 300])
@pytest.mark.parametrize("chunk", [1, 20])
def test_selection_in_the_worst_orders_of_scores(order: str, top_k: int, chunk: int) -> None:
    """One head of one element: the scores are the rows themselves (times the weight)."""
    count = 9000
    score = {
        "ascending": np.arange(count),
        "descending": np.arange(count)[::-1],
        "equal": np.full(count, 7),
        "negative": -(np.arange(count) % 1000),
    }[order].astype(np.float32)
    sign = -1.0 if order == "negative" else 1.0
    q = np.ones((1, chunk, 1, 1), np.float32)
    weights = np.full((1, chunk, 1), sign, np.float32)
    rows = (score * sign).reshape(1, count, 1)
    positions, lengths = np.array([count * RATIO - chunk]), np.array([chunk])
    out = choose((1, 1, top_k), q, weights, rows, positions, lengths)
    for j in range(chunk):
        ready = (positions[0] + j + 1) // RATIO
        np.testing.assert_array_equal(out[0, j], best_reference(score[:ready], top_k))
