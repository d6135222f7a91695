"""The inner product of every projection: a block of rows times one packed panel, accumulated in registers.

`panel_product` is a TVMScript macro, expanded where a kernel uses it, so each kernel stays one PrimFunc. The block of
rows is static: 7 rows times 32 outputs are as many sums as one buffer can hold in registers and reuse each weight
seven times, while one row spreads its sum over four accumulators per vector to cover the latency of the multiply-add.
"""

# mypy: ignore-errors
# (TVMScript: the macros below are parsed by TVM, not run by Python.)

from __future__ import annotations

from tvm.script import tirx as T

from .common import ACCUMULATORS, VECTOR
from .packing import PANEL

VECTORS = PANEL // VECTOR
"""Vectors per row of a panel."""

ROW_BLOCK = ACCUMULATORS // VECTORS
"""Rows in the largest block; `row_blocks` does what remains in blocks of 4, 2 and 1."""


def sums_per_output(rows: int, k: int) -> int:
    """Partial sums of each output in blocks of `rows` rows: enough independent sums, and a divisor of `k`."""
    return max(1, min(4 // rows, k & -k))


@T.macro
def panel_product(sums, x, row_at, weight, panel, start, stop, rows, unroll):
    """``sums[r, :] = sum over k in [start, stop) of x[row_at[r], k] * weight[panel, k, :]``.

    Args:
        sums: local ``[rows * unroll * VECTORS, VECTOR]`` float32; vector c of row r ends up at ``r * VECTORS + c``.
        x: ``[R, K]`` float32.
        row_at: local ``[rows]`` int64, rows of `x`.
        weight: ``[panels, K, PANEL]`` float32 or bfloat16, widened in registers.
        rows, unroll: static; ``stop - start`` must be a multiple of `unroll`.
    """
    for a in T.unroll(rows * unroll * VECTORS):
        for v in T.vectorized(VECTOR):
            sums[a, v] = T.float32(0)
    for step in range((stop - start) // unroll):
        for u in T.unroll(unroll):
            for r in T.unroll(rows):
                for c in T.unroll(VECTORS):
                    for v in T.vectorized(VECTOR):
                        sums[(u * rows + r) * VECTORS + c, v] = sums[(u * rows + r) * VECTORS + c, v] + x[
                            row_at[r], start + step * unroll + u
                        ] * T.cast(weight[panel, start + step * unroll + u, c * VECTOR + v], "float32")
    for a in T.unroll(rows * VECTORS):
        for u in T.unroll(unroll - 1):
            for v in T.vectorized(VECTOR):
                sums[a, v] = sums[a, v] + sums[(u + 1) * rows * VECTORS + a, v]


@T.macro
def row_blocks(block, first, count):
    """Call ``block(row, height)`` over `count` rows from `first`: blocks of `ROW_BLOCK`, then of 4, 2 and 1."""
    for i in range(count // ROW_BLOCK):
        block(first + i * ROW_BLOCK, ROW_BLOCK)
    rest: T.int64 = first + count // ROW_BLOCK * ROW_BLOCK
    left: T.int64 = count % ROW_BLOCK
    if left >= 4:
        block(rest, 4)
    if left % 4 >= 2:
        block(rest + left // 4 * 4, 2)
    if left % 2 == 1:
        block(rest + left - 1, 1)
