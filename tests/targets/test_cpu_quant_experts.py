"""Experts with quantised weights, against float64 with the same weights and the same rounding of rows."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.targets.cpu_harness import compiled, run
from tests.targets.quantised_reference import BITS, VNNI, rounded
from v4c.targets.cpu.kernels.experts import grouped_experts, mixture_of_experts
from v4c.targets.cpu.kernels.quant_packing import quant_pack_gate_up, quant_pack_rows
from v4c.targets.quantisation import dequantised

LIMIT = 2.0
SEEDS = st.integers(0, 2**32 - 1)
LOOSE = {"int8": 0.03, "int4": 0.25}
"""Error of an expert's output, of its norm, where weights and rows are rounded twice."""

pytestmark = pytest.mark.parametrize("vnni", VNNI)


def swiglu(x: np.ndarray, gate_up: np.ndarray) -> np.ndarray:
    """Hidden rows of one expert, in float64."""
    gate, up = np.split(x @ gate_up.astype(np.float64).T, 2, axis=-1)
    gate = np.minimum(gate, LIMIT)
    return gate / (1 + np.exp(-gate)) * np.clip(up, -LIMIT, LIMIT)


class Case:
    """Random weights and a random routing of one size; `g` is the width of the shared expert, 0 for none."""

    def __init__(
        self, experts: int, d: int, f: int, g: int, top_k: int, tokens: tuple[int, int], dtype: str, seed: int
    ) -> None:
        rng = np.random.default_rng(seed)

        def matrix(*shape: int) -> np.ndarray:
            return (rng.standard_normal(shape) * 2 / shape[-1] ** 0.5).astype(np.float32)

        self.sizes, self.shared_f, self.bits, self.dtype = (experts, d, f, top_k), g, BITS[dtype], dtype
        self.x = rng.standard_normal((*tokens, d), dtype=np.float32)
        self.weights = rng.random((*tokens, top_k), dtype=np.float32)
        self.indices = rng.integers(-1, experts, (*tokens, top_k))
        self.stacks = [matrix(experts, 2 * f, d), matrix(experts, d, f)]
        self.shared = [matrix(2 * g, d), matrix(d, g)] if g else []

    def run(self, vnni: bool) -> np.ndarray:
        packed = [
            pack(w, self.bits)
            for w, pack in zip([*self.stacks, *self.shared], [quant_pack_gate_up, quant_pack_rows] * 2, strict=False)
        ]
        if self.shared:
            kernel = compiled(mixture_of_experts, *self.sizes, LIMIT, self.dtype, self.shared_f, vnni)
        else:
            kernel = compiled(grouped_experts, *self.sizes, LIMIT, self.dtype, vnni)
        return run(kernel, [self.x, self.weights, self.indices, *packed], [(self.x.shape, "float32")]).outputs[0]

    def expected(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The output, how far a kernel may be off, and the output without any rounding; ``[tokens, D]``."""
        x = self.x.reshape(-1, self.x.shape[2])
        weights, indices = (a.reshape(len(x), -1) for a in (self.weights, self.indices))
        y, slack, exact = (np.zeros(x.shape) for _ in range(3))
        uses = [(np.arange(len(x)), np.ones(len(x)), *self.shared)] if self.shared else []
        for e, (gate_up, down) in enumerate(zip(*self.stacks, strict=True)):
            tokens, choices = np.nonzero(indices == e)
            uses.append((tokens, weights[tokens, choices], gate_up, down))
        for tokens, scale, gate_up, down in uses:
            if not len(tokens):
                continue
            row, undecided = rounded(x[tokens])
            hidden = swiglu(row, dequantised(gate_up, self.bits))
            # Where the last bit of an input decides, the hidden row may differ by that step's share.
            share = 4 * LIMIT * (undecided @ np.abs(gate_up).T.astype(np.float64)).max(-1, keepdims=True)
            read, open_steps = rounded(hidden, accuracy=1e-5)
            stored = np.abs(dequantised(down, self.bits).astype(np.float64))
            np.add.at(y, tokens, scale[:, None] * (read @ dequantised(down, self.bits).astype(np.float64).T))
            np.add.at(
                slack,
                tokens,
                scale[:, None] * ((1e-5 * np.abs(read).max(-1, keepdims=True) + open_steps + share) @ stored.T),
            )
            np.add.at(exact, tokens, scale[:, None] * (swiglu(x[tokens].astype(np.float64), gate_up) @ down.T))
        return y, slack, exact

    def check(self, vnni: bool) -> None:
        made = self.run(vnni).reshape(-1, self.x.shape[2])
        y, slack, exact = self.expected()
        assert np.all(np.abs(made - y) <= slack + 1e-6)
        assert np.linalg.norm(made - exact) <= LOOSE[self.dtype] * np.linalg.norm(exact) + 1e-6


@settings(deadline=None, max_examples=2)
@given(
    st.integers(1, 9), st.integers(20, 70), st.integers(1, 70), st.integers(0, 70), st.integers(1, 3),
    st.tuples(st.integers(1, 2), st.integers(1, 10)), st.sampled_from(sorted(BITS)), SEEDS,
)  # fmt: skip
def test_experts_of_any_width(
    vnni: bool, experts: int, d: int, f: int, g: int, top_k: int, tokens: tuple[int, int], dtype: str, seed: int
) -> None:
    Case(experts, d, f, g, top_k, tokens, dtype, seed).check(vnni)


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 2), st.integers(1, 40), st.sampled_from([("int8", 0), ("int4", 72)]), SEEDS)
def test_any_token_count(vnni: bool, batch: int, chunk: int, kind: tuple[str, int], seed: int) -> None:
    dtype, g = kind
    Case(6, 40, 24, g, 2, (batch, chunk), dtype, seed).check(vnni)


@pytest.mark.parametrize("dtype", sorted(BITS))
def test_so_many_tokens_that_all_threads_quantise(vnni: bool, dtype: str) -> None:
    Case(6, 40, 24, 72 if dtype == "int4" else 0, 2, (1, 500), dtype, seed=1).check(vnni)


def test_without_any_routed_expert_the_shared_one_is_left(vnni: bool) -> None:
    case = Case(6, 40, 24, 72, 2, (1, 9), "int4", seed=2)
    case.indices[...] = -1
    case.check(vnni)
    case.weights[...] = np.nan  # whatever its weight
    assert np.all(np.isfinite(case.run(vnni)))


def test_experts_nobody_chose_are_not_read(vnni: bool) -> None:
    case = Case(6, 40, 24, 0, 2, (1, 64), "int8", seed=3)
    case.indices[case.indices > 3] = 2
    first = case.run(vnni)
    case.stacks[0][4:], case.stacks[1][4:] = 6e4, -6e4
    np.testing.assert_array_equal(case.run(vnni), first)


def test_the_result_does_not_depend_on_the_number_of_threads(vnni: bool) -> None:
    case = Case(6, 40, 24, 72, 2, (2, 200), "int4", seed=4)
    threads, configure = (tvm.get_global_func(f"runtime.{n}") for n in ("NumThreads", "config_threadpool"))
    several = threads()
    assert several > 1
    together = case.run(vnni)
    configure(1, 1)
    try:
        assert threads() == 1
        alone = case.run(vnni)
    finally:
        configure(1, several)
    np.testing.assert_array_equal(alone, together)
