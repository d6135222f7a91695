"""The three attention kernels against a float64 softmax written out per head, over whole token histories."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.targets.cpu_harness import compiled, run
from v4c.custom_ops.csa_attention import csa_attention
from v4c.custom_ops.hca_attention import hca_attention
from v4c.custom_ops.sliding_attention import sliding_attention
from v4c.targets.cpu.kernels.attention import (
    compressed_sparse_attention,
    heavily_compressed_attention,
    sliding_window_attention,
)
from v4c.targets.cpu.kernels.attention_steps import tiles
from v4c.targets.cpu.schedule import AttentionSchedule

RATIO = 4
TOP_K = 70  # with a window of rows, more than one panel
KINDS = ["sliding", "csa", "hca"]
SEEDS = st.integers(0, 2**32 - 1)


class Config(NamedTuple):
    heads: int
    width: int
    window: int

    @property
    def scale(self) -> float:
        return self.width**-0.5


CONFIGS = [Config(1, 7, 5), Config(2, 24, 8), Config(12, 40, 3), Config(32, 64, 70)]


class Sequence(NamedTuple):
    """Everything that one batch of sequences holds, token by token."""

    q: np.ndarray
    kv: np.ndarray
    rows: np.ndarray
    indices: np.ndarray
    sinks: np.ndarray


def sequence(config: Config, batch: int, total: int, rng: np.random.Generator, spread: float = 1.0) -> Sequence:
    q = spread * rng.standard_normal((batch, total, config.heads, config.width), dtype=np.float32)
    kv = rng.standard_normal((batch, total, config.width), dtype=np.float32)
    rows = rng.standard_normal((batch, max(1, total // RATIO), config.width), dtype=np.float32)
    indices = np.full((batch, total, TOP_K), -1)
    for i, t in np.ndindex(batch, total):
        ready = (t + 1) // RATIO
        chosen = rng.permutation(ready)[: rng.integers(0, TOP_K + 1)]
        # Also between the chosen ones a negative index is no row.
        indices[i, t, np.sort(rng.permutation(TOP_K)[: len(chosen)])] = chosen
    return Sequence(q, kv, rows, indices, rng.standard_normal(config.heads, dtype=np.float32))


def attend_reference(kind: str, config: Config, seq: Sequence, i: int, t: int) -> np.ndarray:
    """Output of token t of sequence i, one head at a time."""
    keys = [seq.kv[i, u] for u in range(max(0, t - config.window + 1), t + 1)]
    if kind == "csa":
        keys += [seq.rows[i, w] for w in seq.indices[i, t] if w >= 0]
    elif kind == "hca":
        keys += [seq.rows[i, w] for w in range((t + 1) // RATIO)]
    stacked = np.array(keys, dtype=np.float64)
    out = np.empty((config.heads, config.width))
    for h in range(config.heads):
        logits = np.append(stacked @ seq.q[i, t, h].astype(np.float64) * config.scale, seq.sinks[h])
        weights = np.exp(logits - logits.max())
        out[h] = (weights / weights.sum())[:-1] @ stacked
    return out


def inputs(kind: str, seq: Sequence, q: np.ndarray, kv: np.ndarray, window: np.ndarray, indices: np.ndarray,
           positions: np.ndarray, lengths: np.ndarray, rows: np.ndarray) -> list[np.ndarray]:  # fmt: skip
    compressed = {"sliding": [], "csa": [rows, indices], "hca": [rows]}[kind]
    return [q, kv, window, *compressed, seq.sinks, positions, lengths]


def kernel(kind: str, config: Config) -> Any:
    heads, width, window = config
    if kind == "sliding":
        return compiled(sliding_window_attention, heads, width, window, config.scale)
    if kind == "csa":
        return compiled(compressed_sparse_attention, heads, width, window, TOP_K, config.scale)
    return compiled(heavily_compressed_attention, heads, width, window, RATIO, config.scale)


def call(kind: str, config: Config, seq: Sequence, window: np.ndarray, at: np.ndarray, lengths: np.ndarray,
         chunk: int) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Run the tokens ``at[i] .. at[i] + lengths[i]``; whatever may not be read is NaN. Returns outputs and window."""
    batch = len(at)
    q = np.full((batch, chunk, *seq.q.shape[2:]), np.nan, np.float32)
    kv = np.full((batch, chunk, seq.kv.shape[2]), np.nan, np.float32)
    indices = np.full((batch, chunk, TOP_K), 2**40)
    rows = np.full_like(seq.rows, np.nan)
    for i, n in enumerate(lengths):
        q[i, :n], kv[i, :n] = seq.q[i, at[i] : at[i] + n], seq.kv[i, at[i] : at[i] + n]
        indices[i, :n] = seq.indices[i, at[i] : at[i] + n]
        ready = (at[i] + n) // RATIO
        rows[i, :ready] = seq.rows[i, :ready]
    arguments = inputs(kind, seq, q, kv, window, indices, at, lengths, rows)
    result = run(kernel(kind, config), arguments, [(q.shape, "float32")])
    return result.outputs[0], result.inputs[2]


def window_at(config: Config, seq: Sequence, at: np.ndarray) -> np.ndarray:
    window = np.full((len(at), config.window, config.width), np.nan, np.float32)
    for i, p in enumerate(at):
        for t in range(max(0, p - config.window), p):
            window[i, t % config.window] = seq.kv[i, t]
    return window


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(KINDS),
    config=st.sampled_from(CONFIGS),
    batch=st.integers(1, 3),
    around=st.sampled_from([0, RATIO, 8, 70, 288]),
    chunk=st.one_of(st.integers(1, 20), st.integers(60, 150)),
    spread=st.sampled_from([1.0, 30.0]),
    seed=SEEDS,
)
def test_tokens_at_any_position(
    kind: str, config: Config, batch: int, around: int, chunk: int, spread: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    at = np.maximum(around + rng.integers(-1, 2, batch), 0)
    lengths = rng.integers(0, chunk + 1, batch)
    seq = sequence(config, batch, around + chunk + 1, rng, spread)
    before = window_at(config, seq, at)
    out, window = call(kind, config, seq, before, at, lengths, chunk)
    for i, n in enumerate(lengths):
        for j in range(n):
            expected = attend_reference(kind, config, seq, i, at[i] + j)
            # An error of the dot products, which grow with the spread, is an error of the logits.
            np.testing.assert_allclose(out[i, j], expected, rtol=1e-5, atol=2e-6 * spread)
        for t in range(max(0, at[i] - config.window), at[i] + n):
            if t >= at[i] + n - config.window:
                np.testing.assert_array_equal(window[i, t % config.window], seq.kv[i, t])
        if n == 0:
            np.testing.assert_array_equal(window[i], before[i])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [CONFIGS[1], CONFIGS[3]])
def test_chunks_agree_with_one_call(kind: str, config: Config) -> None:
    """Bit for bit, where both have tokens enough not to share out a token's rows; within rounding where not."""
    total = 2 * config.window + RATIO
    seq = sequence(config, 1, total, np.random.default_rng())
    empty = np.zeros((1, config.window, config.width), np.float32)
    whole, last = call(kind, config, seq, empty, np.array([0]), np.array([total]), total)
    enough = AttentionSchedule().enough_tokens * tiles(config.heads, config.width, AttentionSchedule()).tokens
    for size in (1, RATIO + 1, config.window + 1, enough + 3):
        window = empty
        for at in range(0, total, size):
            n = min(size, total - at)
            out, window = call(kind, config, seq, window, np.array([at]), np.array([n]), n)
            if n >= enough:
                np.testing.assert_array_equal(out[0], whole[0, at : at + n])
            else:
                np.testing.assert_allclose(out[0], whole[0, at : at + n], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(window, last)


@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_the_torch_reference(kind: str) -> None:
    config, batch, chunk = CONFIGS[2], 3, 9
    seq = sequence(config, batch, 300, np.random.default_rng())
    at, lengths = np.array([0, 3, 290]), np.array([9, 8, 0])
    window = np.zeros((batch, config.window, config.width), np.float32)
    span = at[:, None] + np.arange(chunk)
    row = np.arange(batch)[:, None]
    arguments = inputs(
        kind, seq, seq.q[row, span], seq.kv[row, span], window, seq.indices[row, span], at, lengths, seq.rows
    )
    result = run(kernel(kind, config), arguments, [((batch, chunk, config.heads, config.width), "float32")])
    reference = {"sliding": sliding_attention, "csa": csa_attention, "hca": hca_attention}[kind]
    attributes = [RATIO, config.scale] if kind == "hca" else [config.scale]
    out, new_window = reference(*map(torch.from_numpy, arguments), *attributes)
    for i, n in enumerate(lengths):
        np.testing.assert_allclose(result.outputs[0][i, :n], out[i, :n].numpy(), rtol=1e-5, atol=2e-6)
    np.testing.assert_array_equal(result.inputs[2], new_window.numpy())
