"""Dense projections with packed weights: one code path for a single token and for a prompt chunk.

Projections of one input are merged into one kernel, which starts the threads once and shares out all panels; an RMS
norm of the input can go first. Work is cut into tasks of one panel and some hundred rows, so that a panel is read from
memory once for all those rows, and the reduction is cut into blocks that keep the panel in cache while blocks of rows
pass over it. The sizes of both are in `ProductSchedule`.
"""

# mypy: ignore-errors
# ruff: noqa: B023
# (TVMScript: the functions below are parsed by TVM, not run by Python.)

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import tvm
from tvm.script import tirx as T

from ..schedule import ProductSchedule
from .common import VECTOR
from .packing import PANEL, panels
from .panel_product import VECTORS, row_blocks
from .rms_norm import row_norm
from .weight_formats import FloatFormat, StoredFormat, each_row, quantise_rows, weight_format


def linear(
    n: int, k: int, weight_dtype: str = "float32", dots: bool = False, schedule: ProductSchedule | None = None
) -> tvm.tirx.PrimFunc:
    """``y = x @ weight.T`` with `weight` ``[n, k]`` packed by `pack_rows` or `quant_pack_rows`.

    Args:
        n: outputs; any positive number.
        k: inputs.
        weight_dtype, dots, schedule: as for `merged_linear`.

    Returns:
        PrimFunc of x ``[rows, k]`` float32, weight ``[ceil(n / PANEL), panel]``, y ``[rows, n]`` float32.
    """
    return merged_linear((n,), k, weight_dtype, None, dots, schedule)


def merged_linear(
    sizes: Sequence[int], k: int, weight_dtype: str = "float32", norm_eps: float | None = None, dots: bool = False,
    schedule: ProductSchedule | None = None,
) -> tvm.tirx.PrimFunc:  # fmt: skip
    """``y_i = x @ weight_i.T`` for several weights `[sizes[i], k]`, or the same of ``x``'s RMS norm.

    Args:
        sizes: outputs of each part; any positive numbers.
        k: inputs.
        weight_dtype: ``float32`` or ``bfloat16`` (widened in registers; sums are float32), ``bf16_pairs``
            (`pair_packing`; rows are rounded to bfloat16), ``int8`` or ``int4``
            (`quant_packing`; rows are quantised to 8 bits), ``fp8`` (`native_packing`; widened in registers) or
            ``fp4`` (`native_packing`; rows are quantised to 8 bits).
        norm_eps: if given, ``x / sqrt(mean(x**2) + norm_eps) * norm`` takes the place of ``x``.
        dots: as of `weight_format`.
        schedule: how the work is cut; by default as with AVX-512.

    Returns:
        PrimFunc of x ``[rows, k]`` float32, norm ``[k]`` float32 if `norm_eps` is given, weight
        ``[sum of ceil(sizes[i] / PANEL), panel]`` (each part packed by `pack_rows` or `quant_pack_rows`, one after the
        other; `panel` is the format's ``panel_shape``), then y_i ``[rows, sizes[i]]`` float32 for every part.
    """
    total = sum(panels(n) for n in sizes)
    schedule = schedule or ProductSchedule().for_shape(total, k)
    stored = weight_format(k, weight_dtype, dots, schedule)
    project = projection(sizes, k, schedule, stored=stored)

    def match_outputs(rows):
        """One more argument per part: TVMScript takes a function's arguments from its text, which is fixed."""
        handles = [T.arg(f"y{part}_", T.handle()) for part in range(len(sizes))]
        return [T.match_buffer(y, (rows, T.int64(n)), "float32") for y, n in zip(handles, sizes, strict=True)]

    if norm_eps is None:

        @T.prim_func(private=True, s_tir=True)
        def merged_linear(x_: T.handle, weight_: T.handle):
            T.func_attr({"tirx.noalias": True})
            rows = T.int64()
            x = T.match_buffer(x_, (rows, T.int64(k)), "float32")
            weight = T.match_buffer(weight_, (T.int64(total), *stored.panel_shape), stored.dtype)
            y = match_outputs(rows)
            inputs = stored.inputs(x, rows)
            quantise_rows(stored, x, inputs, rows, k)
            project(inputs, weight, y, rows)

        return merged_linear

    norm_row = row_norm(k, norm_eps)

    @T.prim_func(private=True, s_tir=True)
    def norm_merged_linear(x_: T.handle, norm_: T.handle, weight_: T.handle):
        T.func_attr({"tirx.noalias": True})
        rows = T.int64()
        x = T.match_buffer(x_, (rows, T.int64(k)), "float32")
        norm = T.match_buffer(norm_, (T.int64(k),), "float32")
        weight = T.match_buffer(weight_, (T.int64(total), *stored.panel_shape), stored.dtype)
        y = match_outputs(rows)
        scaled = T.alloc_buffer((rows, T.int64(k)), "float32")
        inputs = stored.inputs(scaled, rows)

        @T.inline
        def prepare(row):
            norm_row(x, norm, scaled, row)
            if stored.quantised:
                stored.quantise(scaled, inputs, row)

        each_row(prepare, rows, k)
        project(inputs, weight, y, rows)

    return norm_merged_linear


def projection(
    sizes: Sequence[int], k: int, schedule: ProductSchedule, groups: int = 1,
    stored: StoredFormat | None = None,
) -> Callable:  # fmt: skip
    """A macro ``project(x, weight, y, rows)``: the loops of a projection into parts, in `groups` independent blocks.

    The macro takes x ``[rows * groups, k]``, weight ``[groups * sum of ceil(sizes[i] / PANEL), panel]`` and a list y of
    ``[rows * groups, sizes[i]]``; the groups of one token are neighbours. `stored` is the format of the weights, by
    default of float ones; if it is quantised, so is x.
    """
    stored = stored or FloatFormat(k, "float32", schedule)
    ends = list(accumulate(panels(n) for n in sizes))
    count = ends[-1]
    total = groups * count
    steps_per_block = max(1, schedule.block_bytes // stored.step_bytes)
    rows_per_task = schedule.rows_per_task

    def part_of(panel, body):
        """``body(part, column, n)`` for the part that `panel` lies in, `column` its first output, `n` the part's width.

        TVMScript's loops run at run time, and a list of buffers has no index then: hence branches, made by Python.
        """
        if len(sizes) == 1:
            return body(0, panel * PANEL, sizes[0])
        for part, (n, end) in enumerate(zip(sizes, ends, strict=True)):
            start = end - panels(n)
            with T.If(T.And(panel >= start, panel < end)), T.Then():
                body(part, (panel - start) * PANEL, n)

    @T.macro
    def store(sums, y, row_at, column, n, reduction, height):
        for r in T.unroll(height):
            if column + PANEL <= n:
                for c in T.unroll(VECTORS):
                    if reduction == 0:
                        for v in T.vectorized(VECTOR):
                            y[row_at[r], column + c * VECTOR + v] = sums[r * VECTORS + c, v]
                    else:
                        for v in T.vectorized(VECTOR):
                            y[row_at[r], column + c * VECTOR + v] = (
                                y[row_at[r], column + c * VECTOR + v] + sums[r * VECTORS + c, v]
                            )
            else:
                # A loop of scalars over `sums` itself would push the accumulators out of registers for every panel.
                line = T.alloc_buffer((PANEL,), "float32", scope="local")
                for c in T.unroll(VECTORS):
                    for v in T.vectorized(VECTOR):
                        line[c * VECTOR + v] = sums[r * VECTORS + c, v]
                for c in range(n % PANEL):
                    if reduction == 0:
                        y[row_at[r], column + c] = line[c]
                    else:
                        y[row_at[r], column + c] = y[row_at[r], column + c] + line[c]

    @T.macro
    def block(x, weight, y, panel, reduction, row, height, cold):
        sums = T.alloc_buffer((height * VECTORS, VECTOR), "float32", scope="local")
        row_at = T.alloc_buffer((height,), "int64", scope="local")
        for r in T.unroll(height):
            row_at[r] = (row + r) * groups + panel // count
        start: T.int64 = reduction * steps_per_block
        stop: T.int64 = T.min(start + steps_per_block, T.int64(stored.steps))
        stored.multiply(sums, x, row_at, weight, panel, start, stop, height, cold)

        @T.inline
        def store_part(part, column, n):
            store(sums, y[part], row_at, column, n, reduction, height)

        part_of(panel % count, store_part)

    @T.macro
    def project(x, weight, y, rows):
        for task in T.parallel((rows + (rows_per_task - 1)) // rows_per_task * total):
            first: T.int64 = task // total * rows_per_task
            height: T.int64 = T.min(rows - first, rows_per_task)
            panel: T.int64 = task % total
            for reduction in range(T.int64(-(-stored.steps // steps_per_block))):

                @T.inline
                def rows_of_panel(row, size):
                    block(x, weight, y, panel, reduction, row, size, row == first)

                row_blocks(rows_of_panel, first, height, stored.row_block)

    return project
