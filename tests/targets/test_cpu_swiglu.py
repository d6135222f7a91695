"""The clamped SwiGLU kernel and the op's torch reference against NumPy in float64."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import v4c.custom_ops  # noqa: F401  registers the torch op
from tests.targets.cpu_harness import compiled, run
from v4c.targets.cpu.kernels.swiglu import swiglu


def swiglu_reference(gate: np.ndarray, up: np.ndarray, limit: float) -> np.ndarray:
    gate = np.minimum(gate.astype(np.float64), limit)
    with np.errstate(over="ignore"):
        return gate / (1 + np.exp(-gate)) * np.clip(up.astype(np.float64), -limit, limit)


@settings(deadline=None, max_examples=8)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 8), st.integers(1, 100)),
    limit=st.sampled_from([1.0, 10.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_matches_numpy(shape: tuple[int, int, int], limit: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    gate, up = rng.standard_normal((2, *shape), dtype=np.float32) * 12
    expected = swiglu_reference(gate, up, limit)
    (y,) = run(compiled(swiglu, shape[2], limit), [gate, up], [(shape, "float32")]).outputs
    np.testing.assert_allclose(y, expected, rtol=2e-6, atol=1e-30)
    reference = torch.ops.v4c.clamped_swiglu(torch.from_numpy(gate), torch.from_numpy(up), limit)
    np.testing.assert_allclose(reference.numpy(), expected, rtol=2e-6, atol=1e-30)


def test_extreme_gates() -> None:
    gate = np.array([[[-1e30, -200.0, -88.0, -87.0, -1e-30, 0.0, 1e-30, 9.5, 10.5, 1e30, np.inf]]], np.float32)
    up = np.ones_like(gate)
    (y,) = run(compiled(swiglu, gate.shape[2], 10.0), [gate, up], [(gate.shape, "float32")]).outputs
    np.testing.assert_allclose(y, swiglu_reference(gate, up, 10.0), rtol=2e-6, atol=1e-7)
