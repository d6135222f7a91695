"""Hyper-connections against float64, and that a token's result does not depend on what else is in the batch."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.targets.cpu_harness import compiled, run
from v4c.targets.cpu.kernels.mhc import mhc_head, mhc_post, mhc_pre

HC_EPS, NORM_EPS = 1e-4, 1e-5
SEEDS = st.integers(0, 2**32 - 1)
STREAMS = st.integers(1, 5)
WIDTHS = st.integers(1, 200)


class Case(NamedTuple):
    streams: np.ndarray
    fn: np.ndarray
    base: np.ndarray
    scale: np.ndarray


def make(shape: tuple[int, int, int, int], outputs: int, scales: int, seed: int) -> Case:
    rng = np.random.default_rng(seed)
    width = shape[2] * shape[3]
    return Case(
        rng.standard_normal(shape, dtype=np.float32) * 3,
        (rng.standard_normal((outputs, width)) / width**0.5).astype(np.float32),
        rng.standard_normal(outputs, dtype=np.float32),
        rng.standard_normal(scales, dtype=np.float32),
    )


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def logits_of(case: Case) -> np.ndarray:
    flat = case.streams.astype(np.float64).reshape(*case.streams.shape[:2], -1)
    normed = flat / np.sqrt((flat**2).mean(-1, keepdims=True) + NORM_EPS)
    return normed @ case.fn.astype(np.float64).T


def pre_reference(case: Case, iterations: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    m = case.streams.shape[2]
    scale = np.repeat(case.scale.astype(np.float64), [m, m, m * m])
    pre, post, comb = np.split(logits_of(case) * scale + case.base, [m, 2 * m], axis=-1)
    comb = np.exp(comb.reshape(*comb.shape[:2], m, m))
    comb = comb / comb.sum(-1, keepdims=True) + HC_EPS
    comb = comb / (comb.sum(-2, keepdims=True) + HC_EPS)
    for _ in range(iterations - 1):
        comb = comb / (comb.sum(-1, keepdims=True) + HC_EPS)
        comb = comb / (comb.sum(-2, keepdims=True) + HC_EPS)
    collapsed = np.einsum("bsm,bsmd->bsd", sigmoid(pre) + HC_EPS, case.streams)
    return collapsed, 2 * sigmoid(post), comb


def run_pre(case: Case, iterations: int) -> list[np.ndarray]:
    b, s, m, d = case.streams.shape
    outputs = [((b, s, d), "float32"), ((b, s, m), "float32"), ((b, s, m, m), "float32")]
    return run(compiled(mhc_pre, m, d, iterations, HC_EPS, NORM_EPS), list(case), outputs).outputs


def check_pre(b: int, s: int, m: int, d: int, iterations: int, seed: int) -> None:
    case = make((b, s, m, d), (2 + m) * m, 3, seed)
    for found, expected in zip(run_pre(case, iterations), pre_reference(case, iterations), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=5)
@given(st.integers(1, 3), st.integers(1, 13), STREAMS, WIDTHS, st.integers(1, 5), SEEDS)
def test_mhc_pre_of_any_width(b: int, s: int, m: int, d: int, iterations: int, seed: int) -> None:
    check_pre(b, s, m, d, iterations, seed)


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 2), st.integers(1, 40), SEEDS)
def test_mhc_pre_of_any_token_count(b: int, s: int, seed: int) -> None:
    check_pre(b, s, 4, 40, 20, seed)


@pytest.mark.parametrize(("s", "d"), [(1, 4096), (5, 640)])
def test_mhc_pre_of_several_parts(s: int, d: int) -> None:
    check_pre(1, s, 4, d, 20, seed=d)


def test_many_iterations_leave_a_doubly_stochastic_matrix() -> None:
    _, _, comb = run_pre(make((2, 5, 4, 24), 24, 3, seed=7), 20)
    np.testing.assert_allclose(comb.sum(-1), 1, atol=1e-3)
    np.testing.assert_allclose(comb.sum(-2), 1, atol=1e-3)


def test_a_token_does_not_depend_on_its_batch() -> None:
    case = make((1, 39, 4, 600), 24, 3, seed=8)
    together = run_pre(case, 20)
    for token in (0, 17, 38):
        alone = run_pre(case._replace(streams=case.streams[:, token : token + 1]), 20)
        for one, many in zip(alone, together, strict=True):
            np.testing.assert_array_equal(one[:, 0], many[:, token])


@settings(deadline=None, max_examples=5)
@given(st.integers(1, 3), st.integers(1, 20), STREAMS, WIDTHS, SEEDS)
def test_mhc_post(b: int, s: int, m: int, d: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shapes = [(b, s, d), (b, s, m, d), (b, s, m), (b, s, m, m)]
    x, streams, post, comb = (rng.standard_normal(shape, dtype=np.float32) for shape in shapes)
    (mixed,) = run(compiled(mhc_post, m, d), [x, streams, post, comb], [((b, s, m, d), "float32")]).outputs
    wide = streams.astype(np.float64)
    expected = post[..., None] * x[:, :, None].astype(np.float64) + np.einsum("bsjk,bsjd->bskd", comb, wide)
    np.testing.assert_allclose(mixed, expected, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=5)
@given(st.integers(1, 3), st.integers(1, 20), STREAMS, WIDTHS, SEEDS)
def test_mhc_head(b: int, s: int, m: int, d: int, seed: int) -> None:
    case = make((b, s, m, d), m, 1, seed)
    kernel = compiled(mhc_head, m, d, HC_EPS, NORM_EPS)
    (collapsed,) = run(kernel, list(case), [((b, s, d), "float32")]).outputs
    weights = sigmoid(logits_of(case) * case.scale + case.base) + HC_EPS
    np.testing.assert_allclose(collapsed, np.einsum("bsm,bsmd->bsd", weights, case.streams), rtol=1e-5, atol=1e-5)
