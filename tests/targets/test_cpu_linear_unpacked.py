"""Projections by an unpacked weight, against float64."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.targets.cpu_harness import compiled, run
from v4c.targets.cpu.kernels.linear_unpacked import linear_unpacked

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@settings(deadline=None, max_examples=12)
@given(
    st.integers(1, 70), st.integers(1, 100), st.integers(1, 9), st.sampled_from(sorted(DTYPES)),
    st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_any_size(n: int, k: int, rows: int, dtype: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, k), dtype=np.float32)
    weight = (rng.standard_normal((n, k)) / k**0.5).astype(DTYPES[dtype])
    found = run(compiled(linear_unpacked, n, k, dtype), [x, weight], [((rows, n), "float32")]).outputs[0]
    np.testing.assert_allclose(found, x.astype(np.float64) @ weight.astype(np.float64).T, rtol=1e-5, atol=1e-5)
