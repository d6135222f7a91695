"""Block-diagonal projection: every group of inputs has weights of its own (the grouped output projection, V4 2.3)."""

# mypy: ignore-errors
# (TVMScript: the function below is parsed by TVM, not run by Python.)

from __future__ import annotations

import tvm
from tvm.script import tirx as T

from ..schedule import ProductSchedule
from .linear import projection
from .packing import panels
from .weight_formats import quantise_rows, weight_format


def grouped_linear(
    groups: int, n: int, k: int, weight_dtype: str = "float32", dots: bool = False,
    schedule: ProductSchedule | None = None,
) -> tvm.tirx.PrimFunc:  # fmt: skip
    """``y[:, g] = x[:, g] @ weight[g].T`` with `weight` ``[groups, n, k]`` packed by `pack_rows` or `quant_pack_rows`.

    Args:
        groups: independent blocks.
        n: outputs per group; any positive number.
        k: inputs per group.
        weight_dtype, dots, schedule: as for `merged_linear`.

    Returns:
        PrimFunc of x ``[rows, groups, k]`` float32, weight ``[groups, ceil(n / PANEL), panel]``,
        y ``[rows, groups, n]`` float32.
    """
    schedule = schedule or ProductSchedule().for_shape(groups * panels(n), k)
    stored = weight_format(k, weight_dtype, dots, schedule)
    project = projection((n,), k, schedule, groups, stored)
    count = panels(n)

    @T.prim_func(private=True, s_tir=True)
    def grouped_linear(x_: T.handle, weight_: T.handle, y_: T.handle):
        T.func_attr({"tirx.noalias": True})
        rows = T.int64()
        x_rgk = T.match_buffer(x_, (rows, T.int64(groups), T.int64(k)), "float32")
        weight_gn = T.match_buffer(weight_, (T.int64(groups), T.int64(count), *stored.panel_shape), stored.dtype)
        y_rgn = T.match_buffer(y_, (rows, T.int64(groups), T.int64(n)), "float32")
        x = x_rgk.view(rows * groups, T.int64(k))
        weight = weight_gn.view(T.int64(groups * count), *stored.panel_shape)
        y = y_rgn.view(rows * groups, T.int64(n))
        inputs = stored.inputs(x, rows * groups)
        quantise_rows(stored, x, inputs, rows * groups, k)
        project(inputs, weight, [y], rows)

    return grouped_linear
