"""What the CPU kernels share: the vector width, sums over lanes, and the exponential and the functions made from it.

Kernels hold their accumulators in explicit local vectors, because LLVM does not reassociate float sums; a vector here
is one AVX-512 register of float32, which LLVM splits into two on narrower machines.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T
from tvm.tirx import IntImm, call_intrin

VECTOR = 16
"""Floats in one vector."""

LINE_BYTES = 64
"""Of a cache line."""


def vector_width(width: int) -> int:
    """The largest power of two up to `VECTOR` that divides `width`: vector loops over it need no tail."""
    return min(VECTOR, width & -width)


def partial_sums(steps: int) -> int:
    """How many independent sums to keep over `steps` vector steps: a divisor of it, enough to hide an add's latency."""
    return min(4, steps & -steps)


def exp(x: Any) -> Any:
    """e to the power of a float32 expression, to 2 ulp, in arithmetic that vectorises (libm's is a call per lane).

    The Cephes polynomial after reduction by multiples of ln 2. Below -87 the result stays at e**-87, above 88 at e**88.
    """
    x = T.min(T.max(x, T.float32(-87.0)), T.float32(88.0))
    n = T.floor(x * T.float32(1.44269504088896341) + T.float32(0.5))
    r = x - n * T.float32(0.693359375) + n * T.float32(2.12194440e-4)
    p = r * T.float32(1.9875691500e-4) + T.float32(1.3981999507e-3)
    for coefficient in (8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = p * r + T.float32(coefficient)
    power = T.reinterpret("float32", (T.cast(n, "int32") + T.int32(127)) * T.int32(1 << 23))
    return (p * r * r + r + T.float32(1.0)) * power


def sigmoid(x: Any) -> Any:
    """1 / (1 + e**-x) of a float32 expression; vectorises."""
    return T.float32(1.0) / (T.float32(1.0) + exp(T.float32(0.0) - x))


def silu(x: Any) -> Any:
    """x * sigmoid(x) of a float32 expression; vectorises."""
    return x / (T.float32(1.0) + exp(T.float32(0.0) - x))


def clamped_swiglu(gate: Any, up: Any, limit: float) -> Any:
    """``silu(min(gate, limit)) * clip(up, -limit, limit)`` of float32 expressions (V4 paper, section 2.1)."""
    high = T.float32(limit)
    return silu(T.min(gate, high)) * T.min(T.max(up, T.float32(-limit)), high)


@T.macro
def sum_lanes(lanes: Any, row: Any, width: int) -> None:
    """Fold ``lanes[row, :width]`` into ``lanes[row, 0]``, halving; `width` is a power of two up to `VECTOR`."""
    if width >= 16:
        for v in T.vectorized(8):
            lanes[row, v] = lanes[row, v] + lanes[row, v + 8]
    if width >= 8:
        for v in T.vectorized(4):
            lanes[row, v] = lanes[row, v] + lanes[row, v + 4]
    if width >= 4:
        for v in T.vectorized(2):
            lanes[row, v] = lanes[row, v] + lanes[row, v + 2]
    if width >= 2:
        lanes[row, 0] = lanes[row, 0] + lanes[row, 1]


def element_bytes(dtype: str) -> int:
    """Bytes of an element of a number type such as ``float32`` or ``uint8``."""
    return int(dtype.lstrip("abcdefghijklmnopqrstuvwxyz")) // 8


def prefetch(element: Any) -> Any:
    """A hint to read the cache line of a buffer's element into L2; wherever it points, it cannot fail."""
    read, second_level, data = (IntImm("int32", n) for n in (0, 2, 1))
    return call_intrin("void", "tirx.prefetch", T.address_of(element), read, second_level, data)
