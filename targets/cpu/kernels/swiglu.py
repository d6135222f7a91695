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
        PrimFunc of gate ``[B, S, f]``, up ``[B, S, f]``, y ``[B, S, f]``, all float32.
    """
    width = vector_width(f)

    @T.prim_func(private=True, s_tir=True)
    def swiglu(gate_: T.handle, up_: T.handle, y_: T.handle):
        T.func_attr({"tirx.noalias": True})
        b = T.int64()
        s = T.int64()
        gate_bsf = T.match_buffer(gate_, (b, s, T.int64(f)), "float32")
        up_bsf = T.match_buffer(up_, (b, s, T.int64(f)), "float32")
        y_bsf = T.match_buffer(y_, (b, s, T.int64(f)), "float32")
        gate = gate_bsf.view(b * s, T.int64(f))
        up = up_bsf.view(b * s, T.int64(f))
        y = y_bsf.view(b * s, T.int64(f))
        for row in T.parallel(b * s):
            for step in range(T.int64(f // width)):
                for v in T.vectorized(width):
                    y[row, step * width + v] = clamped_swiglu(
                        gate[row, step * width + v], up[row, step * width + v], limit
                    )

    return swiglu
