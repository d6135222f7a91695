"""Grouped experts against float64, expert by expert and token by token."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.targets.cpu_harness import compiled, run
from v4c.targets.cpu.kernels.experts import grouped_experts
from v4c.targets.cpu.kernels.packing import pack_gate_up, pack_rows

LIMIT = 2.0
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
SEEDS = st.integers(0, 2**32 - 1)


def swiglu_reference(gate: np.ndarray, up: np.ndarray, limit: float) -> np.ndarray:
    gate = np.minimum(gate.astype(np.float64), limit)
    with np.errstate(over="ignore"):
        return gate / (1 + np.exp(-gate)) * np.clip(up.astype(np.float64), -limit, limit)


def experts_reference(
    x: np.ndarray, weights: np.ndarray, indices: np.ndarray, gate_up: np.ndarray, down: np.ndarray
) -> np.ndarray:
    y = np.zeros(x.shape)
    f = down.shape[-1]
    for b, s, k in np.ndindex(*indices.shape):
        expert = indices[b, s, k]
        if 0 <= expert < len(down):
            both = gate_up[expert].astype(np.float64) @ x[b, s].astype(np.float64)
            hidden = swiglu_reference(both[:f], both[f:], LIMIT)
            y[b, s] += weights[b, s, k] * (down[expert].astype(np.float64) @ hidden)
    return y


class Case:
    """Random weights and a random routing of one size."""

    def __init__(self, experts: int, d: int, f: int, top_k: int, batch: int, chunk: int, dtype: str, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.x = rng.standard_normal((batch, chunk, d), dtype=np.float32)
        self.weights = rng.random((batch, chunk, top_k), dtype=np.float32)
        self.indices = rng.integers(-1, experts, (batch, chunk, top_k))
        self.gate_up = (rng.standard_normal((experts, 2 * f, d)) * 2 / d**0.5).astype(DTYPES[dtype])
        self.down = (rng.standard_normal((experts, d, f)) / f**0.5).astype(DTYPES[dtype])
        self.kernel = compiled(grouped_experts, experts, d, f, top_k, LIMIT, dtype)

    def run(self) -> np.ndarray:
        inputs = [self.x, self.weights, self.indices, pack_gate_up(self.gate_up), pack_rows(self.down)]
        return run(self.kernel, inputs, [(self.x.shape, "float32")]).outputs[0]

    def expected(self) -> np.ndarray:
        return experts_reference(self.x, self.weights, self.indices, self.gate_up, self.down)


@settings(deadline=None, max_examples=5)
@given(
    st.integers(1, 9), st.integers(1, 70), st.integers(1, 70), st.integers(1, 3), st.integers(1, 3), st.integers(1, 13),
    st.sampled_from(sorted(DTYPES)), SEEDS,
)  # fmt: skip
def test_experts_of_any_width(
    experts: int, d: int, f: int, top_k: int, batch: int, chunk: int, dtype: str, seed: int
) -> None:
    case = Case(experts, d, f, top_k, batch, chunk, dtype, seed)
    np.testing.assert_allclose(case.run(), case.expected(), rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 2), st.integers(1, 40), SEEDS)
def test_experts_of_any_token_count(batch: int, chunk: int, seed: int) -> None:
    case = Case(6, 40, 24, 2, batch, chunk, "float32", seed)
    np.testing.assert_allclose(case.run(), case.expected(), rtol=1e-5, atol=1e-5)


def test_experts_nobody_chose_are_not_read() -> None:
    case = Case(6, 40, 24, 2, 2, 5, "float32", seed=1)
    case.indices[case.indices > 3] = 2
    expected = case.expected()
    case.gate_up[4:] = np.nan
    case.down[4:] = np.nan
    np.testing.assert_allclose(case.run(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("nobody", [-1, 6, 2**40])
def test_an_index_outside_the_experts_means_none(nobody: int) -> None:
    case = Case(6, 40, 24, 2, 1, 6, "float32", seed=2)
    case.indices[0, ::2] = nobody
    case.weights[0, ::2] = np.nan  # whatever its weight
    y = case.run()
    assert not np.any(y[0, ::2])
    np.testing.assert_allclose(y[0, 1::2], case.expected()[0, 1::2], rtol=1e-5, atol=1e-5)


def test_the_same_expert_twice_counts_twice() -> None:
    case = Case(6, 40, 24, 2, 1, 3, "float32", seed=3)
    case.indices[...] = 1
    np.testing.assert_allclose(case.run(), case.expected(), rtol=1e-5, atol=1e-5)


def test_the_result_is_the_same_every_time() -> None:
    case = Case(6, 40, 24, 2, 2, 20, "float32", seed=4)
    np.testing.assert_array_equal(case.run(), case.run())
