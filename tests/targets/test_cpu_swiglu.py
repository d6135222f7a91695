"""The clamped SwiGLU kernel and its torch reference against NumPy in float64."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import v4c.custom_ops  # noqa: F401  registers the torch op
from tests.targets.cpu_harness import compiled, run
from v4c.targets.cpu.kernels.swiglu import swiglu


@settings(deadline=None, max_examples=12)
@given(
    batch=st.integers(1, 3),
    chunk=st.integers(1, 4),
    width=st.sampled_from([1, 12, 24, 64]),
    limit=st.sampled_from([1.0, 10.0]),
    seed=st.integers(0, 2**32),
)
def test_matches_numpy(batch: int, chunk: int, width: int, limit: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    gate, up = ((3 * limit * rng.standard_normal((batch, chunk, width))).astype(np.float32) for _ in range(2))
    low = np.minimum(gate.astype(np.float64), limit)
    expected = low / (1 + np.exp(-low)) * np.clip(up.astype(np.float64), -limit, limit)
    result = run(compiled(swiglu, width, limit), [gate, up], [(gate.shape, "float32")])
    np.testing.assert_allclose(result.outputs[0], expected, rtol=2e-6, atol=2e-6)
    reference = torch.ops.v4c.clamped_swiglu(torch.from_numpy(gate), torch.from_numpy(up), limit)
    np.testing.assert_allclose(reference.numpy(), expected, rtol=2e-6, atol=2e-6)
