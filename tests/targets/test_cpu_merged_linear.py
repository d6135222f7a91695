"""Projections of one input in one kernel, plain or after an RMS norm: against float64 and against separate kernels."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.targets.cpu_harness import compiled, run, target
from v4c.targets.cpu.kernels.linear import linear, merged_linear
from v4c.targets.cpu.kernels.packing import PANEL, pack_rows
from v4c.targets.cpu.kernels.rms_norm import rms_norm
from v4c.targets.cpu.kernels.weight_formats import SERIAL_INPUTS
from v4c.targets.cpu.schedule import ProductSchedule

ROWS_PER_TASK = ProductSchedule().rows_per_task
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
K_BLOCK = ProductSchedule().block_bytes // (4 * PANEL)
LONG = 2 * K_BLOCK + 36
SERIAL_ROWS = SERIAL_INPUTS // LONG
TEN_PARTS = (1, PANEL, 7, 2 * PANEL, PANEL - 1, PANEL + 1, 3, 3 * PANEL + 5, PANEL, 2)
SEEDS = st.integers(0, 2**32 - 1)


class Case:
    """Random inputs of one kernel; rows of `x` differ in size, the last is zero."""

    def __init__(self, sizes: tuple[int, ...], k: int, rows: int, dtype: str, eps: float | None, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.sizes, self.rows, self.eps = sizes, rows, eps
        self.x = rng.standard_normal((rows, k), dtype=np.float32) * np.exp2(rng.integers(-3, 4, (rows, 1))).astype("f4")
        self.x[rows // 2 + 1 :][-1:] = 0
        self.norm = rng.standard_normal(k, dtype=np.float32)
        self.parts = [rng.standard_normal((n, k), dtype=np.float32).astype(DTYPES[dtype]) for n in sizes]
        self.kernel_arguments = (sizes, k, dtype, eps)
        self.inputs = [self.x, np.concatenate([pack_rows(p) for p in self.parts])]
        if eps is not None:
            self.inputs.insert(1, self.norm)
        self.outputs = [((rows, n), "float32") for n in sizes]

    def run(self) -> list[np.ndarray]:
        return run(compiled(merged_linear, *self.kernel_arguments), self.inputs, self.outputs).outputs

    def check(self, outputs: list[np.ndarray]) -> None:
        """Compare with float64; rounding grows with the sum of the terms' sizes, not with the result."""
        x = self.x.astype(np.float64)
        if self.eps is not None:
            x = x / np.sqrt((x**2).mean(-1, keepdims=True) + self.eps) * self.norm
        for y, part in zip(outputs, self.parts, strict=True):
            wide = part.astype(np.float64)
            assert np.all(np.abs(y - x @ wide.T) <= 2e-6 * (np.abs(x) @ np.abs(wide).T) + 1e-30)


@settings(deadline=None, max_examples=8)
@given(
    st.lists(st.integers(1, 70), min_size=1, max_size=5), st.integers(1, 60), st.integers(1, 40),
    st.sampled_from(sorted(DTYPES)), st.sampled_from([None, 1e-6, 0.5]), SEEDS,
)  # fmt: skip
def test_parts_of_any_width(sizes: list[int], k: int, rows: int, dtype: str, eps: float | None, seed: int) -> None:
    case = Case(tuple(sizes), k, rows, dtype, eps, seed)
    case.check(case.run())


@pytest.mark.parametrize("eps", [None, 1e-6])
@settings(deadline=None, max_examples=20)
@given(rows=st.integers(1, 40), seed=SEEDS)
def test_any_row_count(eps: float | None, rows: int, seed: int) -> None:
    case = Case((40, PANEL, 5), 24, rows, "float32", eps, seed)
    case.check(case.run())


@pytest.mark.parametrize("rows", [1, SERIAL_ROWS, SERIAL_ROWS + 1, ROWS_PER_TASK + 5])
@pytest.mark.parametrize(("dtype", "eps"), [("float32", None), ("bfloat16", 1e-6)])
def test_ten_parts_and_a_reduction_in_several_blocks(dtype: str, eps: float | None, rows: int) -> None:
    case = Case(TEN_PARTS, LONG, rows, dtype, eps, seed=rows)
    case.check(case.run())


@pytest.mark.parametrize("eps", [None, 1e-6])
@pytest.mark.parametrize("rows", [1, 11])
def test_bits_equal_those_of_separate_kernels(rows: int, eps: float | None) -> None:
    k = K_BLOCK + 20
    case = Case((PANEL, 50, 3), k, rows, "float32", eps, seed=rows)
    x = case.x
    if eps is not None:
        (x,) = run(compiled(rms_norm, k, eps, True), [x, case.norm], [((rows, k), "float32")]).outputs
    for y, part in zip(case.run(), case.parts, strict=True):
        (alone,) = run(compiled(linear, len(part), k), [x, pack_rows(part)], [((rows, len(part)), "float32")]).outputs
        np.testing.assert_array_equal(y, alone)


def test_kernels_with_different_numbers_of_outputs_share_a_module() -> None:
    cases = {f"parts{n}": Case(TEN_PARTS[:n], 24, 3, "float32", 1e-6 if n == 2 else None, seed=n) for n in (1, 2, 10)}
    functions = {
        name: merged_linear(*case.kernel_arguments).with_attr("global_symbol", name) for name, case in cases.items()
    }
    module = tvm.compile(tvm.IRModule(functions), target=target())
    for name, case in cases.items():
        case.check(run({"main": module[name]}, case.inputs, case.outputs).outputs)
