"""Products of bfloat16 weights with rows rounded to bfloat16: against the same rounding in float64."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.targets.cpu_harness import compiled, run
from v4c.passes.relax.layouts import PAIRS
from v4c.targets.cpu.kernels.grouped_linear import grouped_linear
from v4c.targets.cpu.kernels.linear import linear, merged_linear
from v4c.targets.cpu.kernels.pair_packing import pair_pack_gate_up, pair_pack_rows, pair_packed_shape
from v4c.targets.cpu.kernels.rms_norm import rms_norm
from v4c.targets.cpu.levels import machine_features

DOTS = [
    pytest.param(False, id="plain"),
    pytest.param(
        True,
        id="avx512-bf16",
        marks=pytest.mark.skipif("avx512_bf16" not in machine_features(), reason="this processor has no AVX512-BF16"),
    ),
]
SEEDS = st.integers(0, 2**32 - 1)

pytestmark = pytest.mark.parametrize("dots", DOTS)


def rounded(x: np.ndarray) -> np.ndarray:
    return x.astype(ml_dtypes.bfloat16).astype(np.float64)


def check(y: np.ndarray, x: np.ndarray, weight: np.ndarray) -> None:
    """``y = x @ weight.T`` of rounded operands; float32 sums err with the sum of the terms' sizes."""
    rows, matrix = rounded(x), rounded(weight)
    bound = 2e-6 * np.abs(rows) @ np.abs(matrix).T + 1e-30
    assert np.all(np.abs(y - rows @ matrix.T) <= bound)


def product(x: np.ndarray, weight: np.ndarray, dots: bool) -> np.ndarray:
    n, k = weight.shape
    packed = pair_pack_rows(weight)
    assert packed.shape == pair_packed_shape((n, k))
    return run(compiled(linear, n, k, PAIRS, dots), [x, packed], [((len(x), n), "float32")]).outputs[0]


@settings(deadline=None, max_examples=6)
@given(st.integers(1, 100), st.integers(1, 100), st.integers(1, 20), SEEDS)
def test_linear_of_any_width(dots: bool, n: int, k: int, rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, weight = rng.standard_normal((rows, k), dtype=np.float32), rng.standard_normal((n, k), dtype=np.float32)
    check(product(x, weight, dots), x, weight)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 40), SEEDS)
def test_linear_of_any_row_count(dots: bool, rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, weight = rng.standard_normal((rows, 71), dtype=np.float32), rng.standard_normal((40, 71), dtype=np.float32)
    check(product(x, weight, dots), x, weight)


def test_reduction_in_several_blocks(dots: bool) -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((9, 5000), dtype=np.float32), rng.standard_normal((40, 5000), dtype=np.float32)
    check(product(x, weight, dots), x, weight)


def test_a_row_is_the_same_alone_as_beside_another(dots: bool) -> None:
    rng = np.random.default_rng(1)
    x, weight = rng.standard_normal((2, 96), dtype=np.float32), rng.standard_normal((64, 96), dtype=np.float32)
    np.testing.assert_array_equal(product(x, weight, dots)[:1], product(x[:1], weight, dots))


def test_rows_are_rounded_to_even_and_infinities_stay(dots: bool) -> None:
    """Halves between two bfloat16 numbers, and numbers that are too large for one."""
    halves = np.array([1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8), 3.4e38], dtype=np.float32)
    (y,) = run(
        compiled(linear, 1, 1, PAIRS, dots), [halves[:, None], pair_pack_rows(np.ones((1, 1), np.float32))],
        [((4, 1), "float32")],
    ).outputs  # fmt: skip
    y = y[:, 0]
    np.testing.assert_array_equal(y, rounded(halves).astype(np.float32))
    assert y[0] == 1.0
    assert y[1] == 1.015625
    assert np.isinf(y[3])


@pytest.mark.parametrize(("rows", "eps"), [(1, None), (9, None), (1, 1e-6), (9, 1e-6)])
def test_merged_parts(dots: bool, rows: int, eps: float | None) -> None:
    rng = np.random.default_rng(rows)
    sizes, k = (40, 7, 64), 66
    x, norm = rng.standard_normal((rows, k), dtype=np.float32), rng.standard_normal(k, dtype=np.float32)
    parts = [rng.standard_normal((n, k), dtype=np.float32) for n in sizes]
    packed = np.concatenate([pair_pack_rows(p) for p in parts])
    inputs = [x, packed] if eps is None else [x, norm, packed]
    outputs = [((rows, n), "float32") for n in sizes]
    found = run(compiled(merged_linear, sizes, k, PAIRS, eps, dots), inputs, outputs).outputs
    read = x
    if eps is not None:
        (read,) = run(compiled(rms_norm, k, eps, True), [x, norm], [((rows, k), "float32")]).outputs
    for y, part in zip(found, parts, strict=True):
        check(y, read, part)


@settings(deadline=None, max_examples=3)
@given(st.integers(1, 4), st.integers(1, 70), st.integers(1, 70), st.integers(1, 9), SEEDS)
def test_grouped_linear(dots: bool, groups: int, n: int, k: int, rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, groups, k), dtype=np.float32)
    weight = rng.standard_normal((groups, n, k), dtype=np.float32)
    kernel = compiled(grouped_linear, groups, n, k, PAIRS, dots)
    y = run(kernel, [x, pair_pack_rows(weight)], [((rows, groups, n), "float32")]).outputs[0]
    for group in range(groups):
        check(y[:, group], x[:, group], weight[group])


def test_gate_and_up_take_turns(dots: bool) -> None:
    weight = np.random.default_rng(2).standard_normal((2, 2 * 40, 5), dtype=np.float32)
    packed = pair_pack_gate_up(weight).reshape(2, 4, 3, -1)
    for half, at in ((weight[:, :40], 0), (weight[:, 40:], 1)):
        np.testing.assert_array_equal(packed[:, at::2], pair_pack_rows(half))
