"""Dense projection with packed weights: one code path for a single token and for a prompt chunk.

Work is cut into tasks of one panel and up to `ROWS_PER_TASK` rows, so that a panel is read from memory once for all
those rows, and the reduction is cut into blocks that keep the panel in cache while blocks of rows pass over it.
"""

# mypy: ignore-errors
# ruff: noqa: B023
# (TVMScript: the functions below are parsed by TVM, not run by Python.)

from __future__ import annotations

from collections.abc import Callable

import tvm
from tvm.script import tirx as T

from .common import VECTOR
from .packing import PANEL, panels
from .panel_product import ROW_BLOCK, VECTORS, panel_product, row_blocks, sums_per_output

K_BLOCK = 1024
"""Columns per reduction block: 128 KiB of a float32 panel, which stays in a core's L2 cache."""

ROWS_PER_TASK = 256
INPUTS_PER_TASK = 1 << 20
"""Rows that share one reading of a panel, and the elements of `x` they may have: all threads' `x` must stay in L3."""

NARROW_PANELS = 16
NARROW_ROWS_PER_TASK = 32
"""Outputs of fewer than `NARROW_PANELS` panels are shared out among the threads by rows as well."""


def linear(n: int, k: int, weight_dtype: str = "float32") -> tvm.tirx.PrimFunc:
    """``y = x @ weight.T`` with `weight` ``[n, k]`` packed by `pack_rows`.

    Args:
        n: outputs; any positive number.
        k: inputs.
        weight_dtype: ``float32`` or ``bfloat16`` (widened in registers; sums are float32).

    Returns:
        PrimFunc of x ``[rows, k]`` float32, weight ``[ceil(n / PANEL), k, PANEL]``, y ``[rows, n]`` float32.
    """
    project = projection(1, n, k)

    @T.prim_func(private=True, s_tir=True)
    def linear(x_: T.handle, weight_: T.handle, y_: T.handle):
        T.func_attr({"tirx.noalias": True})
        rows = T.int64()
        x = T.match_buffer(x_, (rows, T.int64(k)), "float32")
        weight = T.match_buffer(weight_, (T.int64(panels(n)), T.int64(k), T.int64(PANEL)), weight_dtype)
        y = T.match_buffer(y_, (rows, T.int64(n)), "float32")
        project(x, weight, y, rows)

    return linear


def projection(groups: int, n: int, k: int) -> Callable:
    """A macro ``project(x, weight, y, rows)``: the loops of a projection of `groups` independent blocks.

    The macro takes x ``[rows * groups, k]``, weight ``[groups * ceil(n / PANEL), k, PANEL]`` and y
    ``[rows * groups, n]``; the groups of one token are neighbours.
    """
    count = panels(n)
    total = groups * count
    rows_per_task = NARROW_ROWS_PER_TASK
    if total >= NARROW_PANELS:
        rows_per_task = max(NARROW_ROWS_PER_TASK, min(ROWS_PER_TASK, INPUTS_PER_TASK // k // ROW_BLOCK * ROW_BLOCK))

    @T.macro
    def block(x, weight, y, panel, start, row, height):
        sums = T.alloc_buffer((height * sums_per_output(height, k) * VECTORS, VECTOR), "float32", scope="local")
        line = T.alloc_buffer((PANEL,), "float32", scope="local")
        row_at = T.alloc_buffer((height,), "int64", scope="local")
        for r in T.unroll(height):
            row_at[r] = (row + r) * groups + panel // count
        stop: T.int64 = T.min(start + K_BLOCK, T.int64(k))
        column: T.int64 = panel % count * PANEL
        panel_product(sums, x, row_at, weight, panel, start, stop, height, sums_per_output(height, k))
        for r in T.unroll(height):
            if panel % count < n // PANEL:
                for c in T.unroll(VECTORS):
                    if start == 0:
                        for v in T.vectorized(VECTOR):
                            y[row_at[r], column + c * VECTOR + v] = sums[r * VECTORS + c, v]
                    else:
                        for v in T.vectorized(VECTOR):
                            y[row_at[r], column + c * VECTOR + v] = (
                                y[row_at[r], column + c * VECTOR + v] + sums[r * VECTORS + c, v]
                            )
            else:
                # A loop of scalars over `sums` itself would push the accumulators out of registers for every panel.
                for c in T.unroll(VECTORS):
                    for v in T.vectorized(VECTOR):
                        line[c * VECTOR + v] = sums[r * VECTORS + c, v]
                for c in range(n % PANEL):
                    if start == 0:
                        y[row_at[r], column + c] = line[c]
                    else:
                        y[row_at[r], column + c] = y[row_at[r], column + c] + line[c]

    @T.macro
    def project(x, weight, y, rows):
        for task in T.parallel((rows + (rows_per_task - 1)) // rows_per_task * total):
            first: T.int64 = task // total * rows_per_task
            height: T.int64 = T.min(rows - first, rows_per_task)
            panel: T.int64 = task % total
            for reduction in range(T.int64(-(-k // K_BLOCK))):

                @T.inline
                def rows_of_panel(row, size):
                    block(x, weight, y, panel, reduction * K_BLOCK, row, size)

                row_blocks(rows_of_panel, first, height)

    return project
