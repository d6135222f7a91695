"""The LightningIndex kernel that rotates its queries: chosen rows are judged by their scores in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.targets.cpu_harness import compiled, run
from v4c.targets.cpu.kernels.index import lightning_index

RATIO = 4
CONFIGS = [(1, 8, 3, 8), (16, 24, 5, 8), (5, 7, 40, 6), (33, 16, 300, 2), (48, 40, 16, 16)]
"""Heads, width, top_k, rotary width."""
SEEDS = st.integers(0, 2**32 - 1)

Inputs = dict[str, np.ndarray]


def make(config: tuple[int, int, int, int], batch: int, chunk: int, around: int, seed: int) -> Inputs:
    """Random inputs; rows that are not ready and tokens that are padding hold NaN."""
    heads, width, _, rotary_width = config
    rng = np.random.default_rng(seed)
    positions = np.maximum(around + rng.integers(-2, 3, batch), 0)
    lengths = rng.integers(0, chunk + 1, batch)
    lengths[0] = chunk
    capacity = int((positions + lengths).max()) // RATIO + 1
    inputs = {
        "q": rng.standard_normal((batch, chunk, heads, width), dtype=np.float32),
        "weights": rng.standard_normal((batch, chunk, heads), dtype=np.float32),
        "index_rows": rng.standard_normal((batch, capacity, width), dtype=np.float32),
        "positions": positions,
        "lengths": lengths,
        "inv_freq": (100.0 ** -np.linspace(0, 1, rotary_width // 2)).astype(np.float32),
    }
    for i, n in enumerate(lengths):
        inputs["index_rows"][i, (positions[i] + n) // RATIO :] = np.nan
        inputs["q"][i, n:], inputs["weights"][i, n:] = np.nan, np.nan
    return inputs


def choose(config: tuple[int, int, int, int], inputs: Inputs) -> np.ndarray:
    heads, width, top_k, rotary_width = config
    kernel = compiled(lightning_index, heads, width, RATIO, top_k, rotary_width)
    return run(kernel, list(inputs.values()), [((*inputs["q"].shape[:2], top_k), "int64")]).outputs[0]


def rotated(inputs: Inputs) -> np.ndarray:
    """The queries rotated in float64; the angle itself is a float32 product, as in the model."""
    q, inv_freq = inputs["q"].astype(np.float64), inputs["inv_freq"]
    positions = inputs["positions"][:, None] + np.arange(q.shape[1])
    angles = (positions[..., None].astype(np.float32) * inv_freq).astype(np.float64)
    first = q.shape[3] - 2 * len(inv_freq)
    turned = (q[..., first::2] + 1j * q[..., first + 1 :: 2]) * np.exp(1j * angles)[:, :, None]
    q[..., first::2], q[..., first + 1 :: 2] = turned.real, turned.imag
    return q


@settings(deadline=None, max_examples=20)
@given(
    config=st.sampled_from(CONFIGS),
    batch=st.integers(1, 3),
    chunk=st.sampled_from([1, 2, 7, 18]),
    around=st.sampled_from([0, 4, 60, 2048, 5000]),
    seed=SEEDS,
)
def test_best_rows_of_the_rotated_queries(
    config: tuple[int, int, int, int], batch: int, chunk: int, around: int, seed: int
) -> None:
    inputs = make(config, batch, chunk, around, seed)
    out, q = choose(config, inputs), rotated(inputs)
    for i, j in np.ndindex(batch, chunk):
        ready = (inputs["positions"][i] + j + 1) // RATIO if j < inputs["lengths"][i] else 0
        chosen = out[i, j][: min(config[2], ready)]
        assert len(set(chosen)) == len(chosen)
        assert (out[i, j][len(chosen) :] == -1).all()
        if ready:
            rows = inputs["index_rows"][i, :ready].astype(np.float64)
            scores = inputs["weights"][i, j].astype(np.float64) @ np.maximum(q[i, j] @ rows.T, 0)
            # Rounding may exchange rows whose scores are as good as equal, so places are compared by their scores.
            slack = 1e-5 * np.abs(inputs["weights"][i, j]).sum() * np.abs(q[i, j] @ rows.T).max()
            np.testing.assert_allclose(scores[chosen], np.sort(scores)[::-1][: len(chosen)], rtol=0, atol=slack)


@pytest.mark.parametrize("config", CONFIGS)
def test_without_a_turn_it_is_the_plain_kernel(config: tuple[int, int, int, int]) -> None:
    inputs = make(config, 2, 5, 1000, int(np.random.default_rng().integers(2**32)))
    inputs["inv_freq"][:] = 0
    heads, width, top_k, _ = config
    plain = compiled(lightning_index, heads, width, RATIO, top_k)
    arguments = [inputs[n] for n in ("q", "weights", "index_rows", "positions", "lengths")]
    (expected,) = run(plain, arguments, [((2, 5, top_k), "int64")]).outputs
    np.testing.assert_array_equal(choose(config, inputs), expected)
