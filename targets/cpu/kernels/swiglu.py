"""SwiGLU with the family's clamps, as the shared expert uses it between its projections."""

# mypy: ignore-errors
# (TVMScript: the function below is parsed by TVM, not run by Python.)

from __future__ import annotations

import tvm
from tvm.script import tirx as T

from .common import clamped_swiglu, vector_width


def swiglu(f: int, limit: float) -> tvm.tirx.PrimFunc:
    """``y = silu(min(gate, limit)) * clip(up, -limit, limit)`` (V4 paper, section 2.1).

    Args:
        f: width of a row.
        limit: the model's ``swiglu_limit``.

    Returns:
        PrimFunc of gate ``[rows, f]``, up ``[rows, f]``, y ``[rows, f]``, all float32.
    """
    width = vector_width(f)

    @T.prim_func(private=True, s_tir=True)
    def swiglu(gate_: T.handle, up_: T.handle, y_: T.handle):
        T.func_attr({"tirx.noalias": True})
        rows = T.int64()
        gate = T.match_buffer(gate_, (rows, T.int64(f)), "float32")
        up = T.match_buffer(up_, (rows, T.int64(f)), "float32")
        y = T.match_buffer(y_, (rows, T.int64(f)), "float32")
        for row in T.parallel(rows):
            for step in range(T.int64(f // width)):
                for v in T.vectorized(width):
                    y[row, step * width + v] = clamped_swiglu(
                        gate[row, step * width + v], up[row, step * width + v], limit
                    )

    return swiglu
