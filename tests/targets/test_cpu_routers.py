"""The routers against float64, and their routes against those of the kernels they take the place of."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.targets.cpu_harness import compiled, run
from v4c.targets.cpu.kernels.linear import linear
from v4c.targets.cpu.kernels.packing import pack_rows
from v4c.targets.cpu.kernels.routers import hash_router, topk_router
from v4c.targets.cpu.kernels.routes import topk_route

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
SEEDS = st.integers(0, 2**32 - 1)
SCALING = 1.5


def logits_of(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x.astype(np.float64) @ weight.astype(np.float64).T


def scores(logits: np.ndarray) -> np.ndarray:
    return np.sqrt(np.logaddexp(0.0, logits))


def weights_of(logits: np.ndarray, indices: np.ndarray) -> np.ndarray:
    chosen = np.take_along_axis(scores(logits), indices, axis=-1)
    return chosen / (chosen.sum(-1, keepdims=True) + 1e-20) * SCALING


def run_topk(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray, top_k: int, dtype: str = "float32"
) -> tuple[np.ndarray, np.ndarray]:
    shape = (*x.shape[:2], top_k)
    kernel = compiled(topk_router, len(weight), x.shape[2], top_k, SCALING, dtype)
    weights, indices = run(kernel, [x, pack_rows(weight), bias], [(shape, "float32"), (shape, "int64")]).outputs
    return weights, indices


def run_hash(x: np.ndarray, weight: np.ndarray, indices: np.ndarray) -> np.ndarray:
    kernel = compiled(hash_router, len(weight), x.shape[2], indices.shape[2], SCALING)
    return run(kernel, [x, weight, indices], [(indices.shape, "float32")]).outputs[0]


@settings(deadline=None, max_examples=8)
@given(
    st.integers(1, 70), st.integers(1, 70), st.integers(1, 8), st.integers(1, 3), st.sampled_from([1, 5, 13, 200]),
    st.sampled_from(sorted(DTYPES)), SEEDS,
)  # fmt: skip
def test_topk_router(experts: int, d: int, top_k: int, batch: int, chunk: int, dtype: str, seed: int) -> None:
    top_k = min(top_k, experts)
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((batch, chunk, d), dtype=np.float32)
    weight = (rng.standard_normal((experts, d)) * 3 / d**0.5).astype(DTYPES[dtype])
    bias = rng.standard_normal(experts, dtype=np.float32)
    weights, indices = run_topk(x, weight, bias, top_k, dtype)
    logits = logits_of(x, weight)
    biased = scores(logits) + bias
    # Ranks may differ from float64's only where scores are equal to float32's precision.
    ranked = -np.sort(-biased, axis=-1)[..., :top_k]
    np.testing.assert_allclose(np.take_along_axis(biased, indices, axis=-1), ranked, rtol=0, atol=5e-6)
    assert all(len(set(row)) == top_k for row in indices.reshape(-1, top_k))
    np.testing.assert_allclose(weights, weights_of(logits, indices), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 40])
def test_topk_router_is_the_product_and_the_route(chunk: int) -> None:
    experts, d, top_k = 64, 96, 6
    rng = np.random.default_rng(5)
    x = rng.standard_normal((1, chunk, d), dtype=np.float32)
    weight = rng.standard_normal((experts, d), dtype=np.float32)
    bias = rng.standard_normal(experts, dtype=np.float32)
    (logits,) = run(compiled(linear, experts, d), [x[0], pack_rows(weight)], [((chunk, experts), "float32")]).outputs
    shape = (1, chunk, top_k)
    outputs = [(shape, "float32"), (shape, "int64")]
    expected = run(compiled(topk_route, experts, top_k, SCALING), [logits[None], bias], outputs).outputs
    for got, want in zip(run_topk(x, weight, bias, top_k), expected, strict=True):
        np.testing.assert_array_equal(got, want)


def test_equal_scores_are_taken_in_index_order() -> None:
    x = np.ones((1, 2, 4), np.float32)
    weight = np.zeros((9, 4), np.float32)
    weight[[3, 7]] = 1.0
    x[0, 0] = 0
    _, indices = run_topk(x, weight, np.zeros(9, np.float32), 4)
    assert indices.tolist() == [[[0, 1, 2, 3], [3, 7, 0, 1]]]


@settings(deadline=None, max_examples=8)
@given(
    st.integers(1, 40), st.integers(1, 100), st.integers(1, 6), st.integers(1, 3), st.sampled_from([1, 4, 300]), SEEDS
)
def test_hash_router(experts: int, d: int, top_k: int, batch: int, chunk: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((batch, chunk, d), dtype=np.float32)
    weight = (rng.standard_normal((experts, d)) * 3 / d**0.5).astype(np.float32)
    indices = rng.integers(0, experts, (batch, chunk, top_k))
    expected = weights_of(logits_of(x, weight), indices)
    np.testing.assert_allclose(run_hash(x, weight, indices), expected, rtol=1e-5, atol=1e-6)


def test_hash_router_reads_only_the_chosen_rows() -> None:
    rng = np.random.default_rng(6)
    x = rng.standard_normal((2, 30, 48), dtype=np.float32)
    weight = rng.standard_normal((8, 48), dtype=np.float32)
    indices = rng.integers(0, 5, (2, 30, 3))
    expected = weights_of(logits_of(x, weight), indices)
    weight[5:] = np.nan
    np.testing.assert_allclose(run_hash(x, weight, indices), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("logit", [-150.0, -100.0, -60.0, -1e-3, 0.0, 20.0, 1e4])
def test_scores_keep_their_ratio_at_the_ends(logit: float) -> None:
    x = np.array([[[logit, logit / 1.5]]], np.float32)
    indices = np.array([[[0, 1]]])
    got = run_hash(x, np.eye(2, dtype=np.float32), indices)
    np.testing.assert_allclose(got, weights_of(x.astype(np.float64), indices), rtol=2e-5)
