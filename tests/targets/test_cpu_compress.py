"""The KVCompress kernel against plain float64 loops over whole token histories, in one call and in many."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.targets.cpu_harness import compiled, run
from v4c.custom_ops.kv_compress import kv_compress as torch_reference
from v4c.targets.cpu.kernels.compress import kv_compress

EPS = 1e-6
SEEDS = st.integers(0, 2**32 - 1)


class Config(NamedTuple):
    row_width: int
    overlap: bool
    rotary_width: int
    ratio: int

    @property
    def width(self) -> int:
        return self.row_width * (2 if self.overlap else 1)

    @property
    def ring(self) -> int:
        return self.ratio * (2 if self.overlap else 1)


CONFIGS = [Config(24, True, 8, 4), Config(24, False, 8, 8), Config(7, True, 6, 3), Config(128, False, 16, 5)]


class Parameters(NamedTuple):
    bias: np.ndarray
    norm: np.ndarray
    inv_freq: np.ndarray


def parameters(config: Config, rng: np.random.Generator) -> Parameters:
    return Parameters(
        rng.standard_normal((config.ratio, config.width), dtype=np.float32),
        rng.standard_normal(config.row_width, dtype=np.float32),
        (100.0 ** -np.linspace(0, 1, config.rotary_width // 2)).astype(np.float32),
    )


def row_reference(config: Config, kv: np.ndarray, gate: np.ndarray, p: Parameters, w: int) -> np.ndarray:
    """Compressed row `w` of one sequence, out of its whole history ``[T, width]``."""
    m, c = config.ratio, config.row_width
    own = config.width - c
    slots = []
    if config.overlap and w > 0:
        slots += [(gate[t, :c] + p.bias[t % m, :c], kv[t, :c]) for t in range((w - 1) * m, w * m)]
    slots += [(gate[t, own:] + p.bias[t % m, own:], kv[t, own:]) for t in range(w * m, (w + 1) * m)]
    logits, values = (np.array(a, dtype=np.float64) for a in zip(*slots, strict=True))
    weights = np.exp(logits - logits.max(0))
    row = (weights * values).sum(0) / weights.sum(0)
    row = row / np.sqrt((row**2).mean() + EPS) * p.norm
    angles = (np.float32(w * m) * p.inv_freq).astype(np.float64)
    first = c - config.rotary_width
    turned = (row[first::2] + 1j * row[first + 1 :: 2]) * np.exp(1j * angles)
    row[first::2], row[first + 1 :: 2] = turned.real, turned.imag
    return row


class State(NamedTuple):
    kv: np.ndarray
    gate: np.ndarray
    rows: np.ndarray


def call(config: Config, p: Parameters, kv: np.ndarray, gate: np.ndarray, state: State, positions: np.ndarray,
         lengths: np.ndarray) -> State:  # fmt: skip
    kernel = compiled(kv_compress, config.width, config.row_width, config.rotary_width, config.ratio, EPS)
    after = run(kernel, [kv, gate, *p, *state, positions, lengths], []).inputs
    return State(*after[5:8])


@settings(deadline=None, max_examples=40)
@given(
    config=st.sampled_from(CONFIGS),
    batch=st.integers(1, 3),
    windows=st.integers(0, 3),
    seed=SEEDS,
    calls=st.lists(st.integers(1, 30), min_size=1, max_size=4),
)
def test_calls_of_any_length(config: Config, batch: int, windows: int, seed: int, calls: list[int]) -> None:
    """Rows of a batch start around a window's edge, then take a different number of tokens in each call."""
    rng = np.random.default_rng(seed)
    p = parameters(config, rng)
    starts = np.maximum(windows * config.ratio + rng.integers(-1, 2, batch), 0)
    capacity = (windows * config.ratio + 1 + sum(calls)) // config.ratio + 1
    total = capacity * config.ratio + 1
    kv, gate = rng.standard_normal((2, batch, total, config.width), dtype=np.float32)
    # Nothing of a state that no token has written may be read: it is NaN.
    state = State(
        np.full((batch, config.ring, config.width), np.nan, np.float32),
        np.full((batch, config.ring, config.width), np.nan, np.float32),
        np.full((batch, capacity, config.row_width), np.nan, np.float32),
    )
    for i, start in enumerate(starts):
        for t in range(max(0, start - config.ring), start):
            state.kv[i, t % config.ring], state.gate[i, t % config.ring] = kv[i, t], gate[i, t]
    at = starts.copy()
    for chunk in calls:
        lengths = rng.integers(0, chunk + 1, batch)
        lengths[0] = chunk
        new = np.full((2, batch, chunk, config.width), np.nan, np.float32)
        for i, n in enumerate(lengths):
            new[0, i, :n], new[1, i, :n] = kv[i, at[i] : at[i] + n], gate[i, at[i] : at[i] + n]
        state = call(config, p, new[0], new[1], state, at, lengths)
        at = at + lengths
    for i in range(batch):
        for t in range(max(0, at[i] - config.ring), at[i]):
            np.testing.assert_array_equal(state.kv[i, t % config.ring], kv[i, t])
            np.testing.assert_array_equal(state.gate[i, t % config.ring], gate[i, t])
        for w in range(capacity):
            if starts[i] // config.ratio <= w < at[i] // config.ratio:
                expected = row_reference(config, kv[i], gate[i], p, w)
                np.testing.assert_allclose(state.rows[i, w], expected, rtol=1e-5, atol=1e-5)
            else:
                assert np.isnan(state.rows[i, w]).all(), f"row {w} was written, not one that these calls complete"


@pytest.mark.parametrize("config", CONFIGS)
def test_chunks_give_the_bits_of_one_call_up_to_the_last_row(config: Config) -> None:
    rng = np.random.default_rng()
    p = parameters(config, rng)
    total = 4 * config.ratio  # fills the capacity of four rows exactly
    kv, gate = rng.standard_normal((2, 1, total, config.width), dtype=np.float32)
    ring = np.zeros((1, config.ring, config.width), np.float32)
    empty = State(ring, ring, np.zeros((1, 4, config.row_width), np.float32))
    whole = call(config, p, kv, gate, empty, np.array([0]), np.array([total]))
    for size in (1, config.ratio - 1, config.ratio + 1, 2 * config.ratio + 1):
        state = empty
        for at in range(0, total, size):
            n = min(size, total - at)
            state = call(config, p, kv[:, at : at + n], gate[:, at : at + n], state, np.array([at]), np.array([n]))
        for ours, expected in zip(state, whole, strict=True):
            np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("config", CONFIGS)
def test_agrees_with_the_torch_reference(config: Config) -> None:
    rng = np.random.default_rng()
    p = parameters(config, rng)
    batch, chunk = 3, 2 * config.ratio + 1
    kv, gate = rng.standard_normal((2, batch, chunk, config.width), dtype=np.float32)
    old_kv, old_gate = rng.standard_normal((2, batch, config.ring, config.width), dtype=np.float32)
    state = State(old_kv, old_gate, rng.standard_normal((batch, 8, config.row_width), dtype=np.float32))
    positions, lengths = np.array([0, config.ratio - 1, 3 * config.ratio]), np.array([chunk, chunk - 1, 0])
    ours = call(config, p, kv, gate, state, positions, lengths)
    tensors = map(torch.from_numpy, (kv, gate, *p, *state, positions, lengths))
    for mine, reference in zip(ours, torch_reference(*tensors, config.ratio, EPS), strict=True):
        np.testing.assert_allclose(mine, reference.numpy(), rtol=1e-5, atol=1e-5)
    for mine, before in zip(ours, state, strict=True):
        np.testing.assert_array_equal(mine[2], before[2])  # an idle row
