"""TrailingRope on the CPU: interleaved rotary embedding of the last dims of every head.

The angles of a token are computed once for a block of heads (libm's sin and cos, which stay exact at a million
positions), then applied to each head.
"""

# mypy: ignore-errors
# (TVMScript: names and loops below are parsed by TVM, not run by Python.)

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

_SPLIT_FROM = 16  # heads from which two work items per token pay for a second set of angles


@T.inline
def fill_angles(inv_freq: Any, position: Any, cosines: Any, sines: Any, half: int) -> None:
    """cosines, sines ``[half]`` of ``position * inv_freq``."""
    for d in range(T.int64(half)):
        cosines[d] = T.cos(T.cast(position, "float32") * inv_freq[d])
        sines[d] = T.sin(T.cast(position, "float32") * inv_freq[d])


@T.inline
def rotate_row(
    source: Any, target: Any, row: Any, cosines: Any, sines: Any, width: int, half: int, sign: float
) -> None:
    """Turn the last ``2 * half`` of `width` dims of ``source[row]`` into ``target[row]``, which may be the same.

    `row` is a tuple, the indices before the last; cosines, sines ``[half]`` are what `fill_angles` made.
    """
    first = T.meta_var(T.int64(width - 2 * half))
    for d in range(T.int64(half)):
        even: T.let = source[(*row, first + T.int64(2) * d)]
        odd: T.let = source[(*row, first + T.int64(2) * d + T.int64(1))]
        sine: T.let = sines[d] * T.float32(sign)
        target[(*row, first + T.int64(2) * d)] = even * cosines[d] - odd * sine
        target[(*row, first + T.int64(2) * d + T.int64(1))] = odd * cosines[d] + even * sine


def trailing_rope(heads: int, width: int, rotary_width: int, sign: float) -> PrimFunc:
    """Rotate the trailing `rotary_width` of `width` dims by ``sign * position * inv_freq`` (V4 paper, section 2.3).

    Arguments of the PrimFunc: x ``[B, S, heads, width]`` float32, positions ``[B]`` int64, inv_freq
    ``[rotary_width / 2]`` float32, out ``[B, S, heads, width]`` float32.
    """
    half = rotary_width // 2
    kept = width - rotary_width
    blocks = 2 if heads >= _SPLIT_FROM and heads % 2 == 0 else 1
    block_heads = heads // blocks

    @T.prim_func(private=True, s_tir=True)
    def trailing_rope(x_: T.handle, positions_: T.handle, inv_freq_: T.handle, out_: T.handle):
        T.func_attr({"tirx.noalias": True})
        b = T.int64()
        s = T.int64()
        x = T.match_buffer(x_, (b, s, T.int64(heads), T.int64(width)), "float32")
        positions = T.match_buffer(positions_, (b,), "int64")
        inv_freq = T.match_buffer(inv_freq_, (T.int64(half),), "float32")
        out = T.match_buffer(out_, (b, s, T.int64(heads), T.int64(width)), "float32")
        for item in T.parallel(b * s * T.int64(blocks)):
            i: T.let = T.truncdiv(item // T.int64(blocks), s)
            j: T.let = T.truncmod(item // T.int64(blocks), s)
            cosines = T.alloc_buffer((T.int64(half),), "float32")
            sines = T.alloc_buffer((T.int64(half),), "float32")
            fill_angles(inv_freq, positions[i] + j, cosines, sines, half)
            for hh in range(T.int64(block_heads)):
                h: T.let = item % T.int64(blocks) * T.int64(block_heads) + hh
                for d in range(T.int64(kept)):
                    out[i, j, h, d] = x[i, j, h, d]
                rotate_row(x, out, (i, j, h), cosines, sines, width, half, sign)

    return trailing_rope
