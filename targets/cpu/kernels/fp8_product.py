"""Products with published FP8 weights: codes are widened to float32 in registers, and rows are read as they are.

A block of 128 inputs is summed in units of its outputs' scales, which are powers of two: with them, the sums are those
of the dequantised weights, but for the order of addition.
"""

# mypy: ignore-errors
# (TVMScript: the macros below are parsed by TVM, not run by Python.)

from __future__ import annotations

from tvm.script import tirx as T

from ...native_rows import NATIVE_GROUPS
from .common import VECTOR
from .native_packing import SCALE_BYTES
from .packing import PANEL
from .row_formats import e4m3_value, scale_value

VECTORS = PANEL // VECTOR
"""Vectors per row of a panel."""

GROUP = NATIVE_GROUPS["fp8"]


@T.macro
def fp8_panel_product(sums, x, row_at, weight, panel, start, stop, rows, columns, unroll, k):
    """``sums[r, :] =`` the sum over the groups from `start` to `stop` of row ``row_at[r]`` times panel `panel`.

    Args:
        sums: local ``[rows * VECTORS, VECTOR]`` float32; vector c of row r is ``r * VECTORS + c``.
        x: ``[R, >= k]`` float32.
        row_at: local ``[rows]`` int64, rows of `x`.
        weight: ``[panels, groups, block]`` uint8 from `native_pack_rows`.
        rows, columns, unroll, k: static; `columns` vectors of the panel are taken at once, and `unroll` partial sums of
            each output, as in `panel_product`; `unroll` divides GROUP and ``k % GROUP``.
    """
    for c in T.unroll(VECTORS // columns):
        for a in T.unroll(rows):
            for b in T.unroll(columns):
                for v in T.vectorized(VECTOR):
                    sums[a * VECTORS + c * columns + b, v] = T.float32(0)
        for g in range(start, stop):
            part = T.alloc_buffer((rows * unroll * columns, VECTOR), "float32", scope="local")
            for a in T.unroll(rows * unroll * columns):
                for v in T.vectorized(VECTOR):
                    part[a, v] = T.float32(0)
            for step in range(T.min(T.int64(GROUP), T.int64(k) - g * GROUP) // unroll):
                for u in T.unroll(unroll):
                    for r in T.unroll(rows):
                        for b in T.unroll(columns):
                            for v in T.vectorized(VECTOR):
                                part[(u * rows + r) * columns + b, v] = part[(u * rows + r) * columns + b, v] + x[
                                    row_at[r], g * GROUP + step * unroll + u
                                ] * e4m3_value(
                                    weight[
                                        panel,
                                        g,
                                        SCALE_BYTES["fp8"]
                                        + (step * unroll + u) * PANEL
                                        + (c * columns + b) * VECTOR
                                        + v,
                                    ]
                                )
            for r in T.unroll(rows):
                for b in T.unroll(columns):
                    for u in T.unroll(unroll - 1):
                        for v in T.vectorized(VECTOR):
                            part[r * columns + b, v] = (
                                part[r * columns + b, v] + part[((u + 1) * rows + r) * columns + b, v]
                            )
                    for v in T.vectorized(VECTOR):
                        sums[r * VECTORS + c * columns + b, v] = sums[r * VECTORS + c * columns + b, v] + part[
                            r * columns + b, v
                        ] * scale_value(weight[panel, g, (c * columns + b) * VECTOR + v])
