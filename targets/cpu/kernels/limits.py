"""What the machine can do at most, measured by the library itself: reading of memory, and multiply-adds in registers.

Both are in every compiled library, so `v4c bench` measures them with the threads and the vector
width that the kernels have. They are no kernels of any operator.
"""

# mypy: ignore-errors
# (TVMScript: the functions below are parsed by TVM, not run by Python.)

from __future__ import annotations

import tvm
from tvm.script import tirx as T

from v4c.passes.cost import MATRIX_PEAK, STREAM_READ

from .common import VECTOR

ACCUMULATORS = {"x86-64-v4": 12, "x86-64-v3": 5}
"""Vectors of `VECTOR` floats that stay in registers, enough to hide the latency of two multiply-adds per cycle: 12 of
the 32 registers with AVX-512, 10 of the 16 with AVX2, where a vector is two."""
FEWEST_ACCUMULATORS = 3

LINE = 4 * VECTOR
"""Floats per step of a reading thread: four vectors into four sums."""


def limits(level: str) -> dict[str, tvm.tirx.PrimFunc]:
    """Both functions by name, for a library of that x86-64 level."""
    made = {STREAM_READ: stream_read(), MATRIX_PEAK: matrix_peak(ACCUMULATORS.get(level, FEWEST_ACCUMULATORS))}
    return {name: function.with_attr("global_symbol", name) for name, function in made.items()}


def stream_read() -> tvm.tirx.PrimFunc:
    """Sums of a buffer that every task reads a part of, from its beginning to its end.

    Returns:
        PrimFunc of x ``[tasks, steps, LINE]`` float32, sums ``[tasks, VECTOR]`` float32: of task t, the sum over all
        steps and over every VECTOR-th element of a line.
    """

    @T.prim_func
    def stream_read(x_: T.handle, sums_: T.handle):
        tasks = T.int64()
        steps = T.int64()
        x = T.match_buffer(x_, (tasks, steps, T.int64(LINE)), "float32")
        sums = T.match_buffer(sums_, (tasks, T.int64(VECTOR)), "float32")
        for task in T.parallel(tasks):
            part = T.alloc_buffer((LINE // VECTOR, VECTOR), "float32", scope="local")
            for a in T.unroll(LINE // VECTOR):
                for v in T.vectorized(VECTOR):
                    part[a, v] = T.float32(0)
            for step in range(steps):
                for a in T.unroll(LINE // VECTOR):
                    for v in T.vectorized(VECTOR):
                        part[a, v] = part[a, v] + x[task, step, a * VECTOR + v]
            for a in T.unroll(LINE // VECTOR - 1):
                for v in T.vectorized(VECTOR):
                    part[0, v] = part[0, v] + part[a + 1, v]
            for v in T.vectorized(VECTOR):
                sums[task, v] = part[0, v]

    return stream_read


def matrix_peak(accumulators: int) -> tvm.tirx.PrimFunc:
    """Multiply-adds that touch no memory: every accumulator over and over ``a = a * scale + offset``.

    Args:
        accumulators: vectors that take turns.

    Returns:
        PrimFunc of factors ``[2]`` float32 (scale, offset), multiply_adds int64 (per task; a multiple of
        ``accumulators * VECTOR``), sums ``[tasks, VECTOR]`` float32: of task t, the sum of its accumulators, which
        start as their numbers.
    """

    @T.prim_func
    def matrix_peak(factors_: T.handle, multiply_adds: T.int64, sums_: T.handle):
        tasks = T.int64()
        factors = T.match_buffer(factors_, (T.int64(2),), "float32")
        sums = T.match_buffer(sums_, (tasks, T.int64(VECTOR)), "float32")
        for task in T.parallel(tasks):
            part = T.alloc_buffer((accumulators, VECTOR), "float32", scope="local")
            for a in T.unroll(accumulators):
                for v in T.vectorized(VECTOR):
                    part[a, v] = T.cast(a, "float32")
            for step in range(T.truncdiv(multiply_adds, T.int64(accumulators * VECTOR))):
                for a in T.unroll(accumulators):
                    for v in T.vectorized(VECTOR):
                        part[a, v] = part[a, v] * factors[0] + factors[1]
            for a in T.unroll(accumulators - 1):
                for v in T.vectorized(VECTOR):
                    part[0, v] = part[0, v] + part[a + 1, v]
            for v in T.vectorized(VECTOR):
                sums[task, v] = part[0, v]

    return matrix_peak
