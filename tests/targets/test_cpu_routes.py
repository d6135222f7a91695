"""Expert routes against float64: the choice, its order, ties, and weights at the ends of the score function."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.targets.cpu_harness import compiled, run
from v4c.targets.cpu.kernels.routes import hash_route, topk_route

SEEDS = st.integers(0, 2**32 - 1)


def scores(logits: np.ndarray) -> np.ndarray:
    return np.sqrt(np.logaddexp(0.0, logits.astype(np.float64)))


def weights_of(logits: np.ndarray, indices: np.ndarray, scaling: float) -> np.ndarray:
    chosen = np.take_along_axis(scores(logits), indices, axis=-1)
    return chosen / (chosen.sum(-1, keepdims=True) + 1e-20) * scaling


@settings(deadline=None, max_examples=7)
@given(st.integers(1, 70), st.data(), SEEDS)
def test_topk_route(experts: int, data: st.DataObject, seed: int) -> None:
    top_k = data.draw(st.integers(1, min(experts, 8)))
    batch, chunk = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 13))
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((batch, chunk, experts), dtype=np.float32) * 4
    bias = rng.standard_normal(experts, dtype=np.float32)
    shape = (batch, chunk, top_k)
    kernel = compiled(topk_route, experts, top_k, 2.5)
    weights, indices = run(kernel, [logits, bias], [(shape, "float32"), (shape, "int64")]).outputs
    biased = scores(logits) + bias
    # Ranks may differ from float64's only where scores are equal to float32's precision.
    ranked = -np.sort(-biased, axis=-1)[..., :top_k]
    np.testing.assert_allclose(np.take_along_axis(biased, indices, axis=-1), ranked, rtol=0, atol=2e-6)
    assert all(len(set(row)) == top_k for row in indices.reshape(-1, top_k))
    np.testing.assert_allclose(weights, weights_of(logits, indices, 2.5), rtol=5e-6)


def test_equal_scores_are_taken_in_index_order() -> None:
    logits = np.zeros((1, 2, 9), np.float32)
    logits[0, 1, [3, 7]] = 5.0
    kernel = compiled(topk_route, 9, 4, 1.0)
    outputs = [((1, 2, 4), "float32"), ((1, 2, 4), "int64")]
    weights, indices = run(kernel, [logits, np.zeros(9, np.float32)], outputs).outputs
    assert indices.tolist() == [[[0, 1, 2, 3], [3, 7, 0, 1]]]
    np.testing.assert_allclose(weights[0, 0], 0.25, rtol=1e-6)


@pytest.mark.parametrize("logit", [-60.0, -20.0, 20.0, 1e4])
def test_scores_keep_their_ratio_at_the_ends(logit: float) -> None:
    logits = np.array([[[logit, logit / 1.5]]], np.float32)
    outputs = [((1, 1, 2), "float32"), ((1, 1, 2), "int64")]
    weights, indices = run(compiled(topk_route, 2, 2, 1.5), [logits, np.zeros(2, np.float32)], outputs).outputs
    np.testing.assert_allclose(weights, weights_of(logits, indices, 1.5), rtol=5e-6)


@settings(deadline=None, max_examples=5)
@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 3), st.integers(1, 13), SEEDS)
def test_hash_route(experts: int, top_k: int, batch: int, chunk: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((batch, chunk, experts), dtype=np.float32) * 4
    table = rng.integers(0, experts, (50, top_k))
    ids = rng.integers(0, 50, (batch, chunk))
    shape = (batch, chunk, top_k)
    kernel = compiled(hash_route, experts, top_k, 1.5)
    weights, indices = run(kernel, [logits, ids, table], [(shape, "float32"), (shape, "int64")]).outputs
    np.testing.assert_array_equal(indices, table[ids])
    np.testing.assert_allclose(weights, weights_of(logits, table[ids], 1.5), rtol=5e-6)
