"""RMS norm against float64, and the size of its sum at widths without a full vector."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.targets.cpu_harness import compiled, run
from v4c.targets.cpu.kernels.rms_norm import rms_norm


def reference(x: np.ndarray, eps: float) -> np.ndarray:
    wide = x.astype(np.float64)
    return wide / np.sqrt((wide**2).mean(-1, keepdims=True) + eps)


@settings(deadline=None, max_examples=7)
@given(
    st.integers(1, 300), st.integers(1, 40), st.booleans(), st.sampled_from([1e-6, 0.5]), st.integers(0, 2**32 - 1)
)  # fmt: skip
def test_rms_norm(d: int, rows: int, weighted: bool, eps: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, d), dtype=np.float32)
    weight = rng.standard_normal(d, dtype=np.float32)
    inputs = [x, weight] if weighted else [x]
    (y,) = run(compiled(rms_norm, d, eps, weighted), inputs, [((rows, d), "float32")]).outputs
    expected = reference(x, eps) * (weight if weighted else 1)
    np.testing.assert_allclose(y, expected, rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize("d", [512, 4096, 7168])
def test_published_widths_and_rows_of_zeros(d: int) -> None:
    x = np.random.default_rng(d).standard_normal((3, d), dtype=np.float32) * 1e-3
    x[1] = 0
    (y,) = run(compiled(rms_norm, d, 1e-6, False), [x], [((3, d), "float32")]).outputs
    np.testing.assert_allclose(y, reference(x, 1e-6), rtol=2e-6, atol=0)
