"""Kernels on single rows: norms, rotations, SwiGLU, sums."""

from __future__ import annotations

from typing import Any

from ..launch import Buffer, Launch, ceil_div, device_call, prim_func


def rms_norm(width: int, eps: float, weighted: bool) -> Any:
    """``x [m, D]`` (and weight ``[D]``) float32 to ``x / sqrt(mean(x^2) + eps)`` (times the weight)."""
    buffers: dict[str, Buffer] = {"x": (("m", width), "float32")}
    if weighted:
        buffers["weight"] = ((width,), "float32")
    buffers["y"] = (("m", width), "float32")
    call = device_call("rms_norm", width, weighted)
    return prim_func(
        "rms_norm", buffers, [Launch(call, ("x", "weight" if weighted else "null", eps, "y"), ("m",), 256)]
    )


def add(width: int) -> Any:
    """Two float32 ``[m, D]`` to their sum."""
    buffers = dict.fromkeys(("a", "b_", "y"), (("m", width), "float32"))
    n = f"m * {width}"
    return prim_func("add", buffers, [Launch(device_call("add"), ("a", "b_", n, "y"), (ceil_div(n, 256),), 256)])


def swiglu(width: int, limit: float) -> Any:
    """``silu(min(gate, limit)) * clamp(up, -limit, limit)`` of float32 ``[B, S, F]``."""
    buffers = dict.fromkeys(("gate", "up", "y"), (("b", "s", width), "float32"))
    n = f"b * s * {width}"
    call = device_call("swiglu")
    return prim_func("swiglu", buffers, [Launch(call, ("gate", "up", limit, n, "y"), (ceil_div(n, 256),), 256)])


def trailing_rope(heads: int, width: int, rotary: int, sign: float) -> Any:
    """Rotate the trailing `rotary` dims by ``sign * position * inv_freq`` (V4 paper, section 2.3).

    Arguments of the PrimFunc: x ``[B, S, heads, width]`` float32, positions ``[B]`` int64, inv_freq ``[rotary / 2]``
    float32, y as x.
    """
    buffers: dict[str, Buffer] = {
        "x": (("b", "s", heads, width), "float32"),
        "positions": (("b",), "int64"),
        "inv_freq": ((rotary // 2,), "float32"),
        "y": (("b", "s", heads, width), "float32"),
    }
    call = device_call("rotate_heads", "float", heads, width, rotary // 2)
    launch = Launch(call, ("x", "positions", "inv_freq", "s", sign, "y"), ("b * s", ceil_div(heads, 4)), 128)
    return prim_func("trailing_rope", buffers, [launch])


def rotary_query_kv(heads: int, width: int, rotary: int, q_eps: float, kv_eps: float) -> Any:
    """Norms and rotations before an attention (V4 paper, section 2.3).

    Arguments of the PrimFunc: q ``[B, S, H, C]``, kv ``[B, S, C]``, kv_norm ``[C]`` float32, positions ``[B]`` int64,
    inv_freq ``[rotary / 2]`` float32, q_out, kv_out as q and kv.
    """
    buffers: dict[str, Buffer] = {
        "q": (("b", "s", heads, width), "float32"),
        "kv": (("b", "s", width), "float32"),
        "kv_norm": ((width,), "float32"),
        "positions": (("b",), "int64"),
        "inv_freq": ((rotary // 2,), "float32"),
        "q_out": (("b", "s", heads, width), "float32"),
        "kv_out": (("b", "s", width), "float32"),
    }
    launch = Launch(
        device_call("rotary_query_kv", heads, width, rotary // 2),
        ("q", "kv", "kv_norm", "positions", "inv_freq", "s", q_eps, kv_eps, "q_out", "kv_out"),
        ("b * s", ceil_div(heads + 1, 4)), 128,
    )  # fmt: skip
    return prim_func("rotary_query_kv", buffers, [launch])
