"""Block-diagonal projection: every group of inputs has weights of its own (the grouped output projection, V4 2.3)."""

# mypy: ignore-errors
# (TVMScript: the function below is parsed by TVM, not run by Python.)

from __future__ import annotations

import tvm
from tvm.script import tirx as T

from .linear import projection
from .packing import PANEL, panels


def grouped_linear(groups: int, n: int, k: int, weight_dtype: str = "float32") -> tvm.tirx.PrimFunc:
    """``y[:, g] = x[:, g] @ weight[g].T`` with `weight` ``[groups, n, k]`` packed by `pack_rows`.

    Args:
        groups: independent blocks.
        n: outputs per group; any positive number.
        k: inputs per group.
        weight_dtype: ``float32`` or ``bfloat16`` (widened in registers; sums are float32).

    Returns:
        PrimFunc of x ``[rows, groups, k]`` float32, weight ``[groups, ceil(n / PANEL), k, PANEL]``,
        y ``[rows, groups, n]`` float32.
    """
    project = projection((n,), k, groups)
    count = panels(n)

    @T.prim_func(private=True, s_tir=True)
    def grouped_linear(x_: T.handle, weight_: T.handle, y_: T.handle):
        T.func_attr({"tirx.noalias": True})
        rows = T.int64()
        x = T.match_buffer(x_, (rows, T.int64(groups), T.int64(k)), "float32")
        weight = T.match_buffer(weight_, (T.int64(groups), T.int64(count), T.int64(k), T.int64(PANEL)), weight_dtype)
        y = T.match_buffer(y_, (rows, T.int64(groups), T.int64(n)), "float32")
        project(
            x.view(rows * groups, T.int64(k)),
            weight.view(T.int64(groups * count), T.int64(k), T.int64(PANEL)),
            [y.view(rows * groups, T.int64(n))],
            rows,
        )

    return grouped_linear
