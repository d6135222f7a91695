"""RMS norm of rows, with or without a learned weight."""

# mypy: ignore-errors
# (TVMScript: the functions below are parsed by TVM, not run by Python.)

from __future__ import annotations

from collections.abc import Callable

import tvm
from tvm.script import tirx as T

from .common import partial_sums, sum_lanes, vector_width


def rms_norm(d: int, eps: float, weighted: bool) -> tvm.tirx.PrimFunc:
    """``y = x / sqrt(mean(x**2) + eps) (* weight)`` over the last axis.

    Args:
        d: width of a row.
        eps: added to the mean square.
        weighted: whether the kernel takes a weight.

    Returns:
        PrimFunc of x ``[rows, d]``, weight ``[d]`` if `weighted`, y ``[rows, d]``, all float32.
    """
    norm_row = row_norm(d, eps)

    @T.prim_func(private=True, s_tir=True)
    def weighted_norm(x_: T.handle, weight_: T.handle, y_: T.handle):
        T.func_attr({"tirx.noalias": True})
        rows = T.int64()
        x = T.match_buffer(x_, (rows, T.int64(d)), "float32")
        weight = T.match_buffer(weight_, (T.int64(d),), "float32")
        y = T.match_buffer(y_, (rows, T.int64(d)), "float32")
        for row in T.parallel(rows):
            norm_row(x, weight, y, row)

    @T.prim_func(private=True, s_tir=True)
    def plain_norm(x_: T.handle, y_: T.handle):
        T.func_attr({"tirx.noalias": True})
        rows = T.int64()
        x = T.match_buffer(x_, (rows, T.int64(d)), "float32")
        y = T.match_buffer(y_, (rows, T.int64(d)), "float32")
        for row in T.parallel(rows):
            norm_row(x, None, y, row)

    return weighted_norm if weighted else plain_norm


def row_norm(d: int, eps: float) -> Callable:
    """A macro ``norm_row(x, weight, y, row)``: one row of `rms_norm`; `weight` may be None."""
    width = vector_width(d)
    steps = d // width
    sums = partial_sums(steps)

    @T.macro
    def norm_row(x, weight, y, row):
        lanes = T.alloc_buffer((sums, width), "float32", scope="local")
        for a in T.unroll(sums):
            for v in T.vectorized(width):
                lanes[a, v] = T.float32(0)
        for step in range(T.int64(steps // sums)):
            for a in T.unroll(sums):
                for v in T.vectorized(width):
                    lanes[a, v] = (
                        lanes[a, v] + x[row, (step * sums + a) * width + v] * x[row, (step * sums + a) * width + v]
                    )
        for a in T.unroll(sums - 1):
            for v in T.vectorized(width):
                lanes[0, v] = lanes[0, v] + lanes[a + 1, v]
        sum_lanes(lanes, 0, width)
        lanes[0, 0] = T.float32(1) / T.sqrt(lanes[0, 0] / T.float32(d) + T.float32(eps))
        for step in range(T.int64(steps)):
            for v in T.vectorized(width):
                if weight is None:
                    y[row, step * width + v] = x[row, step * width + v] * lanes[0, 0]
                else:
                    y[row, step * width + v] = x[row, step * width + v] * lanes[0, 0] * weight[step * width + v]

    return norm_row
