"""The inner product of every projection: a block of rows times one packed panel, accumulated in registers.

`panel_product` is a TVMScript macro, expanded where a kernel uses it, so each kernel stays one PrimFunc. The block of
rows is static. With AVX-512, 7 rows times 32 outputs are as many sums as one buffer can hold in registers and reuse
each weight seven times, while one row spreads its sum over four accumulators per vector to cover the latency of the
multiply-add. With fewer registers a block of several rows takes the panel one vector of outputs after the other.
"""

# mypy: ignore-errors
# (TVMScript: the macros below are parsed by TVM, not run by Python.)

from __future__ import annotations

from tvm.script import tirx as T

from .common import VECTOR
from .packing import PANEL

VECTORS = PANEL // VECTOR
"""Vectors per row of a panel."""


@T.macro
def panel_product(sums, x, row_at, weight, panel, start, stop, rows, columns, unroll):
    """``sums[r, :] = sum over k in [start, stop) of x[row_at[r], k] * weight[panel, k, :]``.

    Args:
        sums: local ``[rows * VECTORS, VECTOR]`` float32; vector c of row r is ``r * VECTORS + c``.
        x: ``[R, K]`` float32.
        row_at: local ``[rows]`` int64, rows of `x`.
        weight: ``[panels, K, PANEL]`` float32 or bfloat16, widened in registers.
        rows, columns, unroll: static; `columns` vectors of the panel are taken at once, and `unroll` partial sums of
            each output. `columns` must divide VECTORS, and `unroll` must divide ``stop - start``.
    """
    for group in T.unroll(VECTORS // columns):
        part = T.alloc_buffer((rows * unroll * columns, VECTOR), "float32", scope="local")
        for a in T.unroll(rows * unroll * columns):
            for v in T.vectorized(VECTOR):
                part[a, v] = T.float32(0)
        for step in range((stop - start) // unroll):
            for u in T.unroll(unroll):
                for r in T.unroll(rows):
                    for c in T.unroll(columns):
                        for v in T.vectorized(VECTOR):
                            part[(u * rows + r) * columns + c, v] = part[(u * rows + r) * columns + c, v] + x[
                                row_at[r], start + step * unroll + u
                            ] * T.cast(
                                weight[panel, start + step * unroll + u, (group * columns + c) * VECTOR + v], "float32"
                            )
        for r in T.unroll(rows):
            for c in T.unroll(columns):
                for u in T.unroll(unroll - 1):
                    for v in T.vectorized(VECTOR):
                        part[r * columns + c, v] = (
                            part[r * columns + c, v] + part[((u + 1) * rows + r) * columns + c, v]
                        )
                for v in T.vectorized(VECTOR):
                    sums[r * VECTORS + group * columns + c, v] = part[r * columns + c, v]


@T.macro
def row_blocks(block, first, count, height):
    """``block(row, rows)`` over `count` rows from `first`: blocks of `height` (static) rows, then of 4, 2 and 1."""
    for i in range(count // height):
        block(first + i * height, height)
    rest: T.int64 = first + count // height * height
    left: T.int64 = count % height
    if height > 4:
        if left >= 4:
            block(rest, 4)
    if height > 2:
        if left % 4 >= 2:
            block(rest + left // 4 * 4, 2)
    if height > 1:
        if left % 2 == 1:
            block(rest + left - 1, 1)
