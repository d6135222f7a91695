"""Projection by a weight that lies as the checkpoint has it: rows of outputs, not packed.

For weights that something else reads too - a table of embeddings that is also the output projection - and to measure
what packing buys. Each output is a dot product along a row of the weight.
"""

# mypy: ignore-errors
# (TVMScript: the functions below are parsed by TVM, not run by Python.)

from __future__ import annotations

import tvm
from tvm.script import tirx as T

from ..schedule import UnpackedSchedule
from .common import sum_lanes, vector_width

DEFAULT = UnpackedSchedule()


def linear_unpacked(
    n: int, k: int, weight_dtype: str = "float32", schedule: UnpackedSchedule = DEFAULT
) -> tvm.tirx.PrimFunc:
    """``y = x @ weight.T``.

    Args:
        n: outputs; any positive number.
        k: inputs.
        weight_dtype: ``float32`` or ``bfloat16`` (widened in registers; sums are float32).
        schedule: how many outputs a task has.

    Returns:
        PrimFunc of x ``[rows, k]`` float32, weight ``[n, k]``, y ``[rows, n]`` float32.
    """
    width = vector_width(k)
    outputs = schedule.outputs

    @T.macro
    def dots(x, weight, y, row, output, count):
        lanes = T.alloc_buffer((count, width), "float32", scope="local")
        for o in T.unroll(count):
            for v in T.vectorized(width):
                lanes[o, v] = T.float32(0)
        for step in range(T.int64(k // width)):
            for o in T.unroll(count):
                for v in T.vectorized(width):
                    lanes[o, v] = lanes[o, v] + x[row, step * width + v] * T.cast(
                        weight[output + o, step * width + v], "float32"
                    )
        for o in T.unroll(count):
            sum_lanes(lanes, o, width)
            y[row, output + o] = lanes[o, 0]

    @T.prim_func(private=True, s_tir=True)
    def linear_unpacked(x_: T.handle, weight_: T.handle, y_: T.handle):
        T.func_attr({"tirx.noalias": True})
        rows = T.int64()
        x = T.match_buffer(x_, (rows, T.int64(k)), "float32")
        weight = T.match_buffer(weight_, (T.int64(n), T.int64(k)), weight_dtype)
        y = T.match_buffer(y_, (rows, T.int64(n)), "float32")
        for task in T.parallel(T.int64(-(-n // outputs))):
            for row in range(rows):
                if task < T.int64(n // outputs):
                    dots(x, weight, y, row, task * outputs, outputs)
                else:
                    for o in range(T.int64(n % outputs)):
                        dots(x, weight, y, row, task * outputs + o, 1)

    return linear_unpacked
