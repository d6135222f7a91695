"""The attention kernels that rotate their outputs back, against the torch references in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.targets.cpu_harness import compiled, run
from v4c.custom_ops.derotated_attention import derotated_csa, derotated_hca, derotated_sliding_attention
from v4c.targets.cpu.kernels.attention import (
    compressed_sparse_attention,
    heavily_compressed_attention,
    sliding_window_attention,
)
from v4c.targets.cpu.kernels.rope import trailing_rope

RATIO, TOP_K, CAPACITY = 4, 6, 80
REFERENCES = {"sliding": derotated_sliding_attention, "csa": derotated_csa, "hca": derotated_hca}
KINDS = list(REFERENCES)


class Config(NamedTuple):
    heads: int
    width: int
    window: int
    rotary: int

    @property
    def scale(self) -> float:
        return self.width**-0.5


CONFIGS = [Config(1, 7, 5, 6), Config(2, 24, 8, 24), Config(12, 40, 3, 2), Config(32, 64, 70, 8)]


def make(
    kind: str, config: Config, positions: np.ndarray, lengths: np.ndarray, chunk: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """The kernel's inputs but `inv_freq`; compressed rows that are not ready hold NaN."""
    batch = len(positions)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    ready = (positions + lengths) // RATIO
    rows = normal(batch, CAPACITY, config.width)
    indices = np.full((batch, chunk, TOP_K), -1)
    for i in range(batch):
        rows[i, ready[i] :] = np.nan
        for j in range(lengths[i]):
            seen = (positions[i] + j + 1) // RATIO
            chosen = rng.permutation(min(seen, CAPACITY))[: rng.integers(0, TOP_K + 1)]
            indices[i, j, : len(chosen)] = chosen
    compressed = {"sliding": [], "csa": [rows, indices], "hca": [rows]}[kind]
    own = [normal(batch, chunk, config.heads, config.width), normal(batch, chunk, config.width)]
    return [*own, normal(batch, config.window, config.width), *compressed, normal(config.heads), positions, lengths]


def kernel(kind: str, config: Config, rotary_width: int) -> Any:
    sizes = (config.heads, config.width, config.window)
    if kind == "sliding":
        return compiled(sliding_window_attention, *sizes, config.scale, rotary_width)
    if kind == "csa":
        return compiled(compressed_sparse_attention, *sizes, TOP_K, config.scale, rotary_width)
    return compiled(heavily_compressed_attention, *sizes, RATIO, config.scale, rotary_width)


@settings(deadline=None, max_examples=40)
@given(
    kind=st.sampled_from(KINDS),
    config=st.sampled_from(CONFIGS),
    batch=st.integers(1, 3),
    start=st.sampled_from([0, RATIO, 70, 250]),
    chunk=st.integers(1, 12),
    seed=st.integers(0, 2**32 - 1),
)
def test_equals_the_reference(kind: str, config: Config, batch: int, start: int, chunk: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    positions = start + rng.integers(0, 3, batch)
    lengths = rng.integers(0, chunk + 1, batch)
    # Angles that are exact in float32, to compare with float64.
    inv_freq = (rng.integers(1, 2**12, config.rotary // 2) / 2.0**12).astype(np.float32)
    inputs = [*make(kind, config, positions, lengths, chunk, rng), inv_freq]
    result = run(kernel(kind, config, config.rotary), inputs, [(inputs[0].shape, "float32")])
    tensors = [torch.from_numpy(a) for a in inputs]
    attributes = [RATIO, config.scale] if kind == "hca" else [config.scale]
    doubles = [t.double() if t.is_floating_point() else t for t in tensors]
    out, window = REFERENCES[kind](*doubles, *attributes)  # type: ignore[operator]
    for i, n in enumerate(lengths):
        np.testing.assert_allclose(result.outputs[0][i, :n], out[i, :n].numpy(), rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(result.outputs[0][i, n:], 0)
    np.testing.assert_array_equal(result.inputs[2], window.numpy())


@pytest.mark.parametrize("config", CONFIGS)
def test_equals_the_two_kernels_it_replaces_at_the_longest_positions(config: Config) -> None:
    """Also in the blocks of heads of few tokens and in the whole tokens of many."""
    inv_freq = (10000.0 ** (-np.arange(config.rotary // 2) / config.rotary)).astype(np.float32)
    for chunk in (1, 11):
        rng = np.random.default_rng()
        positions, lengths = np.array([1_048_560, 0]), np.array([chunk, chunk])
        inputs = make("sliding", config, positions, lengths, chunk, rng)
        shape = inputs[0].shape
        (plain,) = run(kernel("sliding", config, 0), inputs, [(shape, "float32")]).outputs
        rope = compiled(trailing_rope, config.heads, config.width, config.rotary, -1.0)
        (expected,) = run(rope, [plain, positions, inv_freq], [(shape, "float32")]).outputs
        (out,) = run(kernel("sliding", config, config.rotary), [*inputs, inv_freq], [(shape, "float32")]).outputs
        np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6)
