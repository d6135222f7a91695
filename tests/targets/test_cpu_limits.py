"""The functions that measure the machine: they must do all the work they are timed for."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.targets.cpu_harness import compiled, run
from v4c import benchmark_limits
from v4c.passes.cost import MATRIX_PEAK, STREAM_READ
from v4c.targets.cpu.kernels.common import VECTOR
from v4c.targets.cpu.kernels.limits import ACCUMULATORS, FEWEST_ACCUMULATORS, LINE, limits, matrix_peak, stream_read
from v4c.targets.cpu.target import LEVELS

COUNTS = sorted({*ACCUMULATORS.values(), FEWEST_ACCUMULATORS})


@settings(deadline=None, max_examples=20)
@given(tasks=st.integers(1, 5), steps=st.integers(1, 30))
def test_stream_read_reads_everything(tasks: int, steps: int) -> None:
    x = np.random.default_rng(0).integers(-9, 10, (tasks, steps, LINE)).astype(np.float32)
    (sums,) = run(compiled(stream_read), [x], [((tasks, VECTOR), "float32")]).outputs
    np.testing.assert_array_equal(sums, x.reshape(tasks, -1, VECTOR).sum(axis=1))


@pytest.mark.parametrize("accumulators", COUNTS)
@pytest.mark.parametrize("steps", [0, 1, 100])
def test_matrix_peak_does_every_step(accumulators: int, steps: int) -> None:
    factors = tvm.runtime.tensor(np.array([0.5, 3.0], np.float32))
    sums = tvm.runtime.tensor(np.full((3, VECTOR), np.nan, np.float32))
    multiply_adds = steps * accumulators * VECTOR
    compiled(matrix_peak, accumulators)["main"](factors, multiply_adds, sums)
    parts = np.arange(accumulators, dtype=np.float64)
    for _ in range(steps):
        parts = parts * 0.5 + 3.0
    np.testing.assert_allclose(sums.numpy(), parts.sum(), rtol=1e-5)


def test_what_the_benchmark_passes_fits_every_level() -> None:
    assert (benchmark_limits._LINE, benchmark_limits._VECTOR) == (LINE, VECTOR)
    assert all(benchmark_limits._MULTIPLY_ADDS % (count * VECTOR) == 0 for count in COUNTS)
    for level in (*LEVELS, "generic"):
        assert set(limits(level)) == {STREAM_READ, MATRIX_PEAK}
