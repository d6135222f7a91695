"""What a GPU can do at most, measured by the library itself: reading of memory, and bfloat16 products in registers.

Both are in every compiled library, for `v4c bench`. They are no kernels of any operator.
"""

from __future__ import annotations

from typing import Any

from v4c.passes.cost import MATRIX_PEAK, STREAM_READ

from ..launch import Launch, device_call, prim_func

THREADS = 256


def limits() -> dict[str, Any]:
    """Both functions by name."""
    made = {STREAM_READ: stream_read(), MATRIX_PEAK: matrix_peak()}
    return {name: function.with_attr("global_symbol", name) for name, function in made.items()}


def stream_read() -> Any:
    """Sums of a buffer that every thread reads a part of: x ``[n, 4]`` float32, sums ``[g, THREADS]`` float32."""
    buffers = {"x": (("n", 4), "float32"), "sums": (("g", THREADS), "float32")}
    return prim_func(STREAM_READ, buffers, [Launch(device_call("stream_read"), ("x", "n", "sums"), ("g",), THREADS)])


def matrix_peak() -> Any:
    """Products of 16 x 8 x 16 bfloat16 on the tensor cores that touch no memory.

    Arguments of the PrimFunc: rounds ``[r]`` float32, of which only the length counts: so often each warp makes eight
    products; sums ``[g, THREADS]`` float32.
    """
    buffers = {"rounds": (("r",), "float32"), "sums": (("g", THREADS), "float32")}
    return prim_func(MATRIX_PEAK, buffers, [Launch(device_call("matrix_peak"), ("r", "sums"), ("g",), THREADS)])
