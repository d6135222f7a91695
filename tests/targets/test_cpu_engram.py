"""The Engram kernels: hashes against Python integers, lookups bit for bit, gate and convolution in float64 loops."""

from __future__ import annotations

from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.targets.cpu_harness import compiled, run
from v4c.custom_ops.engram_gate_conv import engram_gate_conv as torch_gate_conv
from v4c.custom_ops.engram_hash import engram_hash as torch_hash
from v4c.targets.cpu.kernels.engram import engram_gate_conv, engram_hash, engram_lookup

SEEDS = st.integers(0, 2**32 - 1)
VOCAB, PAD, EPS = 50, 3, 1e-6


class Hash(NamedTuple):
    lookup: np.ndarray
    multipliers: np.ndarray
    primes: np.ndarray
    offsets: np.ndarray


def hash_parameters(max_ngram: int, heads: int, rng: np.random.Generator) -> Hash:
    count = (max_ngram - 1) * heads
    primes = rng.choice([2, 3, 101, 499, 1009, 65537, 2147483647], count)
    return Hash(
        rng.integers(0, 2**20, VOCAB),
        rng.integers(-(2**62), 2**62, max_ngram) * 2 + 1,  # products wrap around
        primes,
        np.concatenate([[0], np.cumsum(primes)[:-1]]),
    )


def wrap(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63


def hash_reference(p: Hash, ids: np.ndarray, t: int, heads: int) -> list[int]:
    """Addresses of token t of one sequence of token ids, in Python's integers."""
    out = []
    mixed = wrap(int(p.lookup[ids[t]]) * int(p.multipliers[0]))
    for k in range(1, len(p.multipliers)):
        one = int(p.lookup[ids[t - k] if t >= k else PAD])
        mixed ^= wrap(one * int(p.multipliers[k]))
        for h in range((k - 1) * heads, k * heads):
            out.append(mixed % int(p.primes[h]) + int(p.offsets[h]))
    return out


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.sampled_from([(2, 1), (3, 2), (4, 3)]),
    batch=st.integers(1, 3),
    start=st.integers(0, 9),
    calls=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    seed=SEEDS,
)
def test_hash(sizes: tuple[int, int], batch: int, start: int, calls: list[int], seed: int) -> None:
    max_ngram, heads = sizes
    ring, count = max_ngram - 1, (max_ngram - 1) * heads
    rng = np.random.default_rng(seed)
    p = hash_parameters(max_ngram, heads, rng)
    ids = rng.integers(0, VOCAB, (batch, start + sum(calls)))
    at = rng.integers(0, start + 1, batch)
    history = np.full((batch, ring), 2**60)
    for i in range(batch):
        for t in range(max(0, at[i] - ring), at[i]):
            history[i, t % ring] = p.lookup[ids[i, t]]
    kernel = compiled(engram_hash, max_ngram, count, PAD)
    for chunk in calls:
        lengths = rng.integers(0, chunk + 1, batch)
        new = np.zeros((batch, chunk), np.int64)
        for i, n in enumerate(lengths):
            new[i, :n] = ids[i, at[i] : at[i] + n]
        inputs = [new, *p, history, at, lengths]
        result = run(kernel, inputs, [((batch, chunk, count), "int64")])
        reference, new_history = torch_hash(*map(torch.from_numpy, inputs), PAD)
        history = result.inputs[5]
        np.testing.assert_array_equal(history, new_history.numpy())
        out = result.outputs[0]
        assert np.all((out >= p.offsets) & (out < p.offsets + p.primes)), "an address outside its head's part"
        for i, n in enumerate(lengths):
            np.testing.assert_array_equal(out[i, :n], reference[i, :n].numpy())
            for j in range(n):
                assert out[i, j].tolist() == hash_reference(p, ids[i], at[i] + j, heads)
        at = at + lengths


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)])
@pytest.mark.parametrize("width", [1, 24, 64])
def test_lookup_copies_rows(dtype: np.dtype, width: int) -> None:
    rng = np.random.default_rng()
    table = rng.standard_normal((31, width), dtype=np.float32).astype(dtype)
    addresses = rng.integers(0, 31, (2, 5, 3))
    kernel = compiled(engram_lookup, 3, width, dtype.name)
    (out,) = run(kernel, [table, addresses], [((2, 5, 3 * width), "float32")]).outputs
    np.testing.assert_array_equal(out, table[addresses].astype(np.float32).reshape(2, 5, 3 * width))


class Gate(NamedTuple):
    key_norm: np.ndarray
    stream_norm: np.ndarray
    conv_norm: np.ndarray
    conv_weight: np.ndarray


def gate_parameters(streams: int, width: int, kernel: int, rng: np.random.Generator) -> Gate:
    key, stream, conv = rng.standard_normal((3, streams, width), dtype=np.float32)
    return Gate(key, stream, conv, rng.standard_normal((streams * width, kernel), dtype=np.float32))


def rms(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean() + EPS)


def gated_reference(p: Gate, key: np.ndarray, value: np.ndarray, stream: np.ndarray, m: int) -> np.ndarray:
    """The gated value of one token and stream."""
    key, stream = key.astype(np.float64), stream.astype(np.float64)
    dot = (rms(key) * p.key_norm[m] * rms(stream) * p.stream_norm[m]).sum() / np.sqrt(len(key))
    return value.astype(np.float64) / (1 + np.exp(-np.sign(dot) * np.sqrt(max(abs(dot), 1e-6))))


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.sampled_from([(1, 7, 2, 1), (4, 24, 4, 3), (2, 64, 3, 2)]),  # streams, width, kernel, dilation
    batch=st.integers(1, 3),
    start=st.integers(0, 12),
    calls=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    seed=SEEDS,
)
def test_gate_and_convolution(
    sizes: tuple[int, int, int, int], batch: int, start: int, calls: list[int], seed: int
) -> None:
    streams, width, kernel_size, dilation = sizes
    ring = (kernel_size - 1) * dilation
    rng = np.random.default_rng(seed)
    p = gate_parameters(streams, width, kernel_size, rng)
    total = start + sum(calls)
    keys, hidden = rng.standard_normal((2, batch, total, streams, width), dtype=np.float32)
    value = rng.standard_normal((batch, total, width), dtype=np.float32)
    at = rng.integers(0, start + 1, batch)
    gated = np.array(
        [[[gated_reference(p, keys[i, t, m], value[i, t], hidden[i, t, m], m) for m in range(streams)]
          for t in range(total)] for i in range(batch)]
    )  # fmt: skip
    normed = np.array([[[rms(x) * p.conv_norm[m] for m, x in enumerate(row)] for row in one] for one in gated])
    state = np.full((batch, ring, streams * width), np.nan, np.float32)
    for i in range(batch):
        for t in range(max(0, at[i] - ring), at[i]):
            state[i, t % ring] = normed[i, t].reshape(-1)
    kernel = compiled(engram_gate_conv, streams, width, kernel_size, dilation, EPS)
    taps = p.conv_weight.astype(np.float64).reshape(streams, width, kernel_size)
    for chunk in calls:
        lengths = rng.integers(0, chunk + 1, batch)
        span = np.minimum(at[:, None] + np.arange(chunk), total - 1)
        row = np.arange(batch)[:, None]
        inputs = [keys[row, span], value[row, span], hidden[row, span], *p, state, at, lengths]
        result = run(kernel, inputs, [((batch, chunk, streams, width), "float32")])
        (out,), after = result.outputs, result.inputs[7]
        for i, n in enumerate(lengths):
            for t in range(at[i], at[i] + n):
                conv = np.zeros((streams, width))
                for k in range(kernel_size):
                    source = t - (kernel_size - 1 - k) * dilation
                    if source >= 0:
                        conv += normed[i, source] * taps[:, :, k]
                expected = hidden[i, t] + gated[i, t] + conv / (1 + np.exp(-conv))
                np.testing.assert_allclose(out[i, t - at[i]], expected, rtol=1e-5, atol=2e-5)
            for t in range(max(0, at[i] + n - ring), at[i] + n):
                np.testing.assert_allclose(after[i, t % ring], normed[i, t].reshape(-1), rtol=1e-5, atol=1e-5)
            if n == 0:
                np.testing.assert_array_equal(after[i], state[i])
        state, at = after, at + lengths


def test_gate_agrees_with_the_torch_reference() -> None:
    rng = np.random.default_rng()
    p = gate_parameters(4, 24, 4, rng)
    keys, hidden = rng.standard_normal((2, 2, 20, 4, 24), dtype=np.float32)
    keys[0, 0] = 0  # a dot product of exactly zero gates by one half
    value = rng.standard_normal((2, 20, 24), dtype=np.float32)
    state = rng.standard_normal((2, 9, 96), dtype=np.float32)
    inputs = [keys, value, hidden, *p, state, np.array([0, 30]), np.array([20, 17])]
    result = run(compiled(engram_gate_conv, 4, 24, 4, 3, EPS), inputs, [(hidden.shape, "float32")])
    out, new_state = torch_gate_conv(*map(torch.from_numpy, inputs), 3, EPS)
    for i, n in enumerate((20, 17)):
        np.testing.assert_allclose(result.outputs[0][i, :n], out[i, :n].numpy(), rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(result.inputs[7], new_state.numpy(), rtol=1e-5, atol=2e-5)
