"""Routed experts and the shared one in one kernel, against float64, token by token."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.targets.cpu_harness import compiled, run
from v4c.targets.cpu.kernels.experts import grouped_experts, mixture_of_experts
from v4c.targets.cpu.kernels.packing import pack_gate_up, pack_rows

LIMIT = 2.0
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
SEEDS = st.integers(0, 2**32 - 1)


def expert(x: np.ndarray, gate_up: np.ndarray, down: np.ndarray) -> np.ndarray:
    """One expert on rows ``[n, d]``, in float64."""
    gate, up = np.split(x.astype(np.float64) @ gate_up.astype(np.float64).T, 2, axis=-1)
    gate = np.minimum(gate, LIMIT)
    return (gate / (1 + np.exp(-gate)) * np.clip(up, -LIMIT, LIMIT)) @ down.astype(np.float64).T


class Case:
    """Random weights and a random routing of one size."""

    def __init__(
        self, experts: int, d: int, f: int, g: int, top_k: int, batch: int, chunk: int, dtype: str, seed: int
    ) -> None:
        rng = np.random.default_rng(seed)

        def matrix(*shape: int) -> np.ndarray:
            return (rng.standard_normal(shape) * 2 / shape[-1] ** 0.5).astype(DTYPES[dtype])

        self.x = rng.standard_normal((batch, chunk, d), dtype=np.float32)
        self.weights = rng.random((batch, chunk, top_k), dtype=np.float32)
        self.indices = rng.integers(-1, experts, (batch, chunk, top_k))
        self.gate_up, self.down = matrix(experts, 2 * f, d), matrix(experts, d, f)
        self.shared_gate_up, self.shared_down = matrix(2 * g, d), matrix(d, g)
        self.kernel = compiled(mixture_of_experts, experts, d, f, top_k, LIMIT, dtype, g)

    def run(self) -> np.ndarray:
        inputs = [
            self.x, self.weights, self.indices, pack_gate_up(self.gate_up), pack_rows(self.down),
            pack_gate_up(self.shared_gate_up), pack_rows(self.shared_down),
        ]  # fmt: skip
        return run(self.kernel, inputs, [(self.x.shape, "float32")]).outputs[0]

    def expected(self) -> np.ndarray:
        x = self.x.reshape(-1, self.x.shape[2])
        weights, indices = (a.reshape(len(x), -1) for a in (self.weights, self.indices))
        y = expert(x, self.shared_gate_up, self.shared_down)
        for e in range(len(self.down)):
            tokens, choices = np.nonzero(indices == e)
            if len(tokens):
                made = expert(x[tokens], self.gate_up[e], self.down[e])
                np.add.at(y, tokens, weights[tokens, choices, None] * made)
        return y.reshape(self.x.shape)

    def check(self) -> None:
        np.testing.assert_allclose(self.run(), self.expected(), rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=4)
@given(
    st.integers(1, 9), st.integers(1, 70), st.integers(1, 70), st.integers(1, 70), st.integers(1, 3),
    st.integers(1, 3), st.integers(1, 13), st.sampled_from(sorted(DTYPES)), SEEDS,
)  # fmt: skip
def test_experts_of_any_width(
    experts: int, d: int, f: int, g: int, top_k: int, batch: int, chunk: int, dtype: str, seed: int
) -> None:
    Case(experts, d, f, g, top_k, batch, chunk, dtype, seed).check()


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 2), st.integers(1, 40), SEEDS)
def test_any_token_count(batch: int, chunk: int, seed: int) -> None:
    Case(6, 40, 24, 72, 2, batch, chunk, "float32", seed).check()


@pytest.mark.parametrize(("f", "g"), [(72, 24), (24, 72), (40, 40)])
def test_the_shared_expert_may_be_wider_or_narrower(f: int, g: int) -> None:
    Case(6, 40, f, g, 2, 2, 5, "float32", seed=7).check()


def test_experts_nobody_chose_are_not_read() -> None:
    case = Case(12, 40, 24, 24, 3, 1, 256, "float32", seed=1)
    case.indices[case.indices > 6] = 2
    expected = case.expected()
    case.gate_up[7:] = np.nan
    case.down[7:] = np.nan
    np.testing.assert_allclose(case.run(), expected, rtol=1e-5, atol=1e-5)


def test_without_any_routed_expert_the_shared_one_is_left() -> None:
    case = Case(6, 40, 24, 24, 2, 1, 9, "float32", seed=2)
    case.indices[...] = -1
    case.weights[...] = np.nan  # whatever its weight
    case.gate_up[...] = np.nan
    case.down[...] = np.nan
    case.check()


def test_without_the_shared_expert_the_result_is_that_of_the_routed_ones() -> None:
    case = Case(6, 40, 24, 24, 2, 2, 20, "float32", seed=3)
    case.shared_down[...] = 0
    inputs = [case.x, case.weights, case.indices, pack_gate_up(case.gate_up), pack_rows(case.down)]
    kernel = compiled(grouped_experts, 6, 40, 24, 2, LIMIT)
    (routed,) = run(kernel, inputs, [(case.x.shape, "float32")]).outputs
    np.testing.assert_array_equal(case.run(), routed)


def test_the_result_does_not_depend_on_the_number_of_threads() -> None:
    case = Case(6, 70, 72, 40, 2, 2, 20, "float32", seed=4)
    threads, configure = (tvm.get_global_func(f"runtime.{n}") for n in ("NumThreads", "config_threadpool"))
    several = threads()
    assert several > 1
    together = case.run()
    configure(1, 1)
    try:
        assert threads() == 1
        alone = case.run()
    finally:
        configure(1, several)
    np.testing.assert_array_equal(alone, together)
