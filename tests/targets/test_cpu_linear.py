"""The packed projections against float64 products, at widths and row counts that leave every kind of remainder."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.targets.cpu_harness import compiled, run
from v4c.targets.cpu.kernels.grouped_linear import grouped_linear
from v4c.targets.cpu.kernels.linear import linear
from v4c.targets.cpu.kernels.packing import (
    PANEL,
    pack_gate_up,
    pack_rows,
    packed_gate_up_shape,
    packed_shape,
)
from v4c.targets.cpu.schedule import ProductSchedule

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
ROWS_PER_TASK = ProductSchedule().rows_per_task
K_BLOCK = ProductSchedule().block_bytes // (4 * PANEL)
SEEDS = st.integers(0, 2**32 - 1)


def weights(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32).astype(DTYPES[dtype])


def check_linear(n: int, k: int, rows: int, dtype: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, k), dtype=np.float32)
    weight = weights(rng, (n, k), dtype)
    (y,) = run(compiled(linear, n, k, dtype), [x, pack_rows(weight)], [((rows, n), "float32")]).outputs
    wide = weight.astype(np.float64)
    # Rounding grows with the sum of the terms' sizes, not with the result, which may cancel.
    bound = 2e-6 * (np.abs(x).astype(np.float64) @ np.abs(wide).T) + 1e-30
    assert np.all(np.abs(y - x.astype(np.float64) @ wide.T) <= bound)


@settings(deadline=None, max_examples=6)
@given(st.integers(1, 100), st.integers(1, 70), st.integers(1, 40), st.sampled_from(sorted(DTYPES)), SEEDS)
def test_linear_of_any_width(n: int, k: int, rows: int, dtype: str, seed: int) -> None:
    check_linear(n, k, rows, dtype, seed)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 40), st.sampled_from(sorted(DTYPES)), SEEDS)
def test_linear_of_any_row_count(rows: int, dtype: str, seed: int) -> None:
    check_linear(40, 24, rows, dtype, seed)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("rows", [1, 2, 7, 37])
@pytest.mark.parametrize("k", [K_BLOCK, K_BLOCK + 1, 2 * K_BLOCK + 36])
def test_reduction_in_several_blocks(k: int, rows: int, dtype: str) -> None:
    check_linear(PANEL + 1, k, rows, dtype, seed=k + rows)


@pytest.mark.parametrize("rows", [ROWS_PER_TASK - 1, ROWS_PER_TASK, ROWS_PER_TASK + 5])
def test_rows_in_several_tasks(rows: int) -> None:
    check_linear(16 * PANEL + 3, 20, rows, "float32", seed=rows)


@settings(deadline=None, max_examples=4)
@given(
    st.integers(1, 4), st.integers(1, 70), st.integers(1, 50), st.integers(1, 20), st.sampled_from(sorted(DTYPES)),
    SEEDS,
)  # fmt: skip
def test_grouped_linear(groups: int, n: int, k: int, rows: int, dtype: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, groups, k), dtype=np.float32)
    weight = weights(rng, (groups, n, k), dtype)
    kernel = compiled(grouped_linear, groups, n, k, dtype)
    (y,) = run(kernel, [x, pack_rows(weight)], [((rows, groups, n), "float32")]).outputs
    wide = weight.astype(np.float64)
    bound = 2e-6 * np.einsum("rgk,gnk->rgn", np.abs(x).astype(np.float64), np.abs(wide)) + 1e-30
    assert np.all(np.abs(y - np.einsum("rgk,gnk->rgn", x.astype(np.float64), wide)) <= bound)


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.integers(1, 3), max_size=2), st.integers(1, 70), st.integers(1, 9), st.sampled_from([1, 16, PANEL]),
    SEEDS,
)  # fmt: skip
def test_packing_keeps_every_weight_and_pads_with_zeros(lead: list[int], n: int, k: int, panel: int, seed: int) -> None:
    weight = weights(np.random.default_rng(seed), (*lead, n, k), "bfloat16")
    packed = pack_rows(weight, panel)
    assert packed.shape == packed_shape(weight.shape, panel)
    assert packed.dtype == weight.dtype
    rows = packed.swapaxes(-1, -2).reshape(*lead, -1, k)
    np.testing.assert_array_equal(rows[..., :n, :], weight)
    assert not np.any(rows[..., n:, :])


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 70), st.integers(1, 9), SEEDS)
def test_gate_and_up_panels_alternate(f: int, k: int, seed: int) -> None:
    weight = weights(np.random.default_rng(seed), (3, 2 * f, k), "float32")
    packed = pack_gate_up(weight)
    assert packed.shape == packed_gate_up_shape(weight.shape)
    np.testing.assert_array_equal(packed[:, 0::2], pack_rows(weight[:, :f]))
    np.testing.assert_array_equal(packed[:, 1::2], pack_rows(weight[:, f:]))
