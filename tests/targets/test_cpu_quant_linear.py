"""Projections with quantised weights: tightly against the same rounding in float64, loosely against exact products."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.targets.cpu_harness import compiled, run
from tests.targets.quantised_reference import BITS, VNNI, rounded
from v4c.targets.cpu.kernels.grouped_linear import grouped_linear
from v4c.targets.cpu.kernels.linear import linear, merged_linear
from v4c.targets.cpu.kernels.quant_packing import block_bytes, quant_pack_rows
from v4c.targets.cpu.kernels.rms_norm import rms_norm
from v4c.targets.cpu.kernels.weight_formats import SERIAL_INPUTS
from v4c.targets.cpu.schedule import ProductSchedule
from v4c.targets.quantisation import GROUP, dequantised

ROWS_PER_TASK = ProductSchedule().rows_per_task
SEEDS = st.integers(0, 2**32 - 1)
LOOSE = {"int8": 0.012, "int4": 0.15}
"""Error of a product, of the norm of the result: about 1/127 of the largest of a group, and 1/8 for 4 bits."""

pytestmark = pytest.mark.parametrize("vnni", VNNI)


def random_rows(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Rows of different size."""
    sizes = np.exp2(rng.integers(-3, 4, (*shape[:-1], 1))).astype(np.float32)
    return rng.standard_normal(shape, dtype=np.float32) * sizes


def check(y: np.ndarray, x: np.ndarray, weight: np.ndarray, dtype: str) -> None:
    """``y = x @ weight.T``; rounding of float32 grows with the sum of the terms' sizes, not with the result."""
    read, slack = rounded(x)
    stored = dequantised(weight, BITS[dtype]).astype(np.float64)
    assert np.all(np.abs(y - read @ stored.T) <= (2e-6 * np.abs(read) + slack) @ np.abs(stored).T + 1e-30)


def product(x: np.ndarray, weight: np.ndarray, dtype: str, vnni: bool) -> np.ndarray:
    n, k = weight.shape
    packed = quant_pack_rows(weight, BITS[dtype])
    return run(compiled(linear, n, k, dtype, vnni), [x, packed], [((len(x), n), "float32")]).outputs[0]


@settings(deadline=None, max_examples=3)
@given(st.integers(1, 100), st.integers(1, 100), st.integers(1, 20), st.sampled_from(sorted(BITS)), SEEDS)
def test_linear_of_any_width(vnni: bool, n: int, k: int, rows: int, dtype: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, weight = random_rows(rng, rows, k), random_rows(rng, n, k)
    check(product(x, weight, dtype, vnni), x, weight, dtype)


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 40), st.sampled_from(sorted(BITS)), SEEDS)
def test_linear_of_any_row_count(vnni: bool, rows: int, dtype: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, weight = random_rows(rng, rows, 70), random_rows(rng, 40, 70)
    check(product(x, weight, dtype, vnni), x, weight, dtype)


@pytest.mark.parametrize("dtype", sorted(BITS))
def test_reduction_in_several_blocks_and_rows_in_several_tasks(vnni: bool, dtype: str) -> None:
    k = ProductSchedule().block_bytes // block_bytes(BITS[dtype]) * GROUP + 37
    rng = np.random.default_rng(k)
    weight = random_rows(rng, 33, k)
    for rows in (1, SERIAL_INPUTS // k + 1, ROWS_PER_TASK + 5):
        x = random_rows(rng, rows, k)
        check(product(x, weight, dtype, vnni), x, weight, dtype)


@pytest.mark.parametrize("dtype", sorted(BITS))
def test_the_result_is_near_the_exact_product(vnni: bool, dtype: str) -> None:
    rng = np.random.default_rng(1)
    x, weight = rng.standard_normal((20, 1024), dtype=np.float32), rng.standard_normal((64, 1024), dtype=np.float32)
    exact = x.astype(np.float64) @ weight.T
    assert np.linalg.norm(product(x, weight, dtype, vnni) - exact) <= LOOSE[dtype] * np.linalg.norm(exact)


@pytest.mark.parametrize("dtype", sorted(BITS))
def test_extreme_values(vnni: bool, dtype: str) -> None:
    k = 3 * GROUP
    x = np.random.default_rng(2).standard_normal((7, k), dtype=np.float32)
    x[0, :GROUP] = 0
    x[1] = 0
    x[2, 5] = 1e6  # the rest of its group rounds to zero
    x[3] = 3e38
    x[4] = -1e-42  # no normal float32: zero
    x[5] = np.where(np.arange(k) % 2, 127.0, -127.0)
    x[6] = 1.5 * 2.0**-126
    weight = np.random.default_rng(3).standard_normal((40, k), dtype=np.float32)
    weight[0] = 0
    weight[1, GROUP:] = 0
    weight[2, 9] = -6e4
    weight[3] = 1e-3
    weight[4:6] = [[5e4], [-5e4]]
    weight[6] = np.where(np.arange(k) % 2, 1.0, -1.0)
    weight[:, 0] *= 1e-3
    x[3] *= 1e-8
    y = product(x, weight, dtype, vnni)
    check(y, x, weight, dtype)
    assert not np.any(y[1])
    assert not np.any(y[4])
    assert not np.any(y[:, 0])


@pytest.mark.parametrize("dtype", sorted(BITS))
@pytest.mark.parametrize("eps", [None, 1e-6])
@pytest.mark.parametrize("rows", [1, 13, SERIAL_INPUTS // 70 + 1])
def test_merged_parts(vnni: bool, rows: int, eps: float | None, dtype: str) -> None:
    sizes, k = (40, 1, 64, 33), 70
    rng = np.random.default_rng(rows)
    x, norm = random_rows(rng, rows, k), rng.standard_normal(k, dtype=np.float32)
    parts = [rng.standard_normal((n, k), dtype=np.float32) for n in sizes]
    packed = np.concatenate([quant_pack_rows(p, BITS[dtype]) for p in parts])
    inputs = [x, packed] if eps is None else [x, norm, packed]
    kernel = compiled(merged_linear, sizes, k, dtype, eps, vnni)
    outputs = run(kernel, inputs, [((rows, n), "float32") for n in sizes]).outputs
    if eps is not None:  # The norm itself has tests; here its last bit could decide how a value is rounded.
        (x,) = run(compiled(rms_norm, k, eps, True), [x, norm], [((rows, k), "float32")]).outputs
    for y, part in zip(outputs, parts, strict=True):
        check(y, x, part, dtype)


@settings(deadline=None, max_examples=2)
@given(
    st.integers(1, 4), st.integers(1, 70), st.integers(1, 70), st.integers(1, 20), st.sampled_from(sorted(BITS)), SEEDS
)
def test_grouped_linear(vnni: bool, groups: int, n: int, k: int, rows: int, dtype: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, weight = random_rows(rng, rows, groups, k), random_rows(rng, groups, n, k)
    kernel = compiled(grouped_linear, groups, n, k, dtype, vnni)
    packed = quant_pack_rows(weight, BITS[dtype])
    (y,) = run(kernel, [x, packed], [((rows, groups, n), "float32")]).outputs
    for g in range(groups):
        check(y[:, g], x[:, g], weight[g], dtype)
