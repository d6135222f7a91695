"""The TrailingRope kernel against float64 rotation of each pair, and its own inverse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.targets.cpu_harness import compiled, run
from v4c.custom_ops.trailing_rope import trailing_rope as torch_reference
from v4c.targets.cpu.kernels.rope import trailing_rope

SHAPES = [(1, 8, 8), (3, 24, 8), (5, 7, 6), (16, 40, 2), (17, 33, 32)]  # heads, width, rotary width
SEEDS = st.integers(0, 2**32 - 1)


def frequencies(rotary_width: int) -> np.ndarray:
    return (10000.0 ** (-np.arange(0, rotary_width, 2) / rotary_width)).astype(np.float32)


def rotate_reference(x: np.ndarray, positions: np.ndarray, inv_freq: np.ndarray, sign: float) -> np.ndarray:
    """Pair by pair as complex numbers; the angle itself is a float32 product, as in the model."""
    out = x.astype(np.float64)
    first = x.shape[-1] - 2 * len(inv_freq)
    for i, j in np.ndindex(*x.shape[:2]):
        angle = (np.float32(positions[i] + j) * inv_freq).astype(np.float64)
        for pair in range(len(inv_freq)):
            at = first + 2 * pair
            turned = (out[i, j, :, at] + 1j * out[i, j, :, at + 1]) * np.exp(1j * sign * angle[pair])
            out[i, j, :, at], out[i, j, :, at + 1] = turned.real, turned.imag
    return out


@settings(deadline=None, max_examples=25)
@given(
    shape=st.sampled_from(SHAPES),
    batch=st.integers(1, 3),
    chunk=st.integers(1, 5),
    start=st.integers(0, 1_048_570),
    sign=st.sampled_from([1.0, -1.0]),
    seed=SEEDS,
)
def test_rotates_every_pair(
    shape: tuple[int, int, int], batch: int, chunk: int, start: int, sign: float, seed: int
) -> None:
    heads, width, rotary_width = shape
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((batch, chunk, heads, width), dtype=np.float32)
    positions = np.minimum(start + rng.integers(0, 9, batch), 1_048_570)
    inv_freq = frequencies(rotary_width)
    kernel = compiled(trailing_rope, heads, width, rotary_width, sign)
    (out,) = run(kernel, [x, positions, inv_freq], [(x.shape, "float32")]).outputs
    np.testing.assert_allclose(out, rotate_reference(x, positions, inv_freq, sign), rtol=1e-5, atol=2e-6)
    kept = width - rotary_width
    np.testing.assert_array_equal(out[..., :kept], x[..., :kept])
    torch_out = torch_reference(*map(torch.from_numpy, (x, positions, inv_freq)), sign)
    np.testing.assert_allclose(out, torch_out.numpy(), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("heads", [1, 16])
def test_negative_sign_undoes_the_rotation(heads: int) -> None:
    x = np.random.default_rng().standard_normal((2, 3, heads, 24), dtype=np.float32)
    positions, inv_freq = np.array([5, 999_983]), frequencies(8)
    turned = x
    for sign in (1.0, -1.0):
        kernel = compiled(trailing_rope, heads, 24, 8, sign)
        (turned,) = run(kernel, [turned, positions, inv_freq], [(x.shape, "float32")]).outputs
    np.testing.assert_allclose(turned, x, atol=1e-6)
