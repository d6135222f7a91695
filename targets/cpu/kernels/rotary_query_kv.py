"""RotaryQueryKV on the CPU: norm and rotation of the query heads and of the key/value row, in one parallel region.

A row is normalised and then rotated where it lies, while it is in the cache. A work item is a token, or, if it is the
only one and large, half of its rows; the angles are computed once per item. A single small item starts no thread.
"""

# mypy: ignore-errors
# (TVMScript: names and loops below are parsed by TVM, not run by Python.)

from __future__ import annotations

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from .rms_norm import row_norm
from .rope import fill_angles, rotate_row

_SPLIT_FROM = 16384  # floats of a lone token from which two halves of it pay for a second set of angles


def rotary_query_kv(heads: int, width: int, rotary_width: int, q_eps: float, kv_eps: float) -> PrimFunc:
    """RMS norm of each query head and of the key/value row, their trailing dims rotated (V4 paper, section 2.3).

    Arguments of the PrimFunc, float32 unless noted: q ``[B, S, heads, width]``, kv ``[B, S, width]``, kv_norm
    ``[width]``, positions ``[B]`` int64, inv_freq ``[rotary_width / 2]``, q_rotated as q, kv_rotated as kv.
    """
    half = rotary_width // 2
    lone_parts = 2 if heads * width >= _SPLIT_FROM else 1
    norm_head = row_norm(width, q_eps)
    norm_kv = row_norm(width, kv_eps)

    @T.macro
    def rotate_part(q, kv, kv_norm, inv_freq, q_rotated, kv_rotated, position, token, part, parts):
        """The `part`-th of `parts` of a token's rows; the key/value row counts as one more head, the last."""
        cosines = T.alloc_buffer((T.int64(half),), "float32")
        sines = T.alloc_buffer((T.int64(half),), "float32")
        fill_angles(inv_freq, position, cosines, sines, half)
        first: T.let = T.truncdiv(part * T.int64(heads + 1), parts)
        after: T.let = T.truncdiv((part + T.int64(1)) * T.int64(heads + 1), parts)
        for h in range(T.min(after, T.int64(heads)) - first):
            row: T.let = token * T.int64(heads) + first + h
            norm_head(q, None, q_rotated, row)
            rotate_row(q_rotated, q_rotated, (row,), cosines, sines, width, half, 1.0)
        if part == parts - T.int64(1):
            norm_kv(kv, kv_norm, kv_rotated, token)
            rotate_row(kv_rotated, kv_rotated, (token,), cosines, sines, width, half, 1.0)

    @T.prim_func(private=True, s_tir=True)
    def rotary_query_kv(
        q_: T.handle,
        kv_: T.handle,
        kv_norm_: T.handle,
        positions_: T.handle,
        inv_freq_: T.handle,
        q_rotated_: T.handle,
        kv_rotated_: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        b = T.int64()
        s = T.int64()
        q = T.match_buffer(q_, (b, s, T.int64(heads), T.int64(width)), "float32")
        kv = T.match_buffer(kv_, (b, s, T.int64(width)), "float32")
        kv_norm = T.match_buffer(kv_norm_, (T.int64(width),), "float32")
        positions = T.match_buffer(positions_, (b,), "int64")
        inv_freq = T.match_buffer(inv_freq_, (T.int64(half),), "float32")
        q_rotated = T.match_buffer(q_rotated_, (b, s, T.int64(heads), T.int64(width)), "float32")
        kv_rotated = T.match_buffer(kv_rotated_, (b, s, T.int64(width)), "float32")
        heads_in = q.view(b * s * T.int64(heads), T.int64(width))
        heads_out = q_rotated.view(b * s * T.int64(heads), T.int64(width))
        rows_in = kv.view(b * s, T.int64(width))
        rows_out = kv_rotated.view(b * s, T.int64(width))
        parts: T.let = T.if_then_else(b * s == T.int64(1), T.int64(lone_parts), T.int64(1))
        if b * s * parts == T.int64(1):
            rotate_part(
                heads_in, rows_in, kv_norm, inv_freq, heads_out, rows_out, positions[0], T.int64(0), T.int64(0),
                T.int64(1),
            )  # fmt: skip
        else:
            for item in T.parallel(b * s * parts):
                token: T.let = T.truncdiv(item, parts)
                position: T.let = positions[T.truncdiv(token, s)] + T.truncmod(token, s)
                rotate_part(
                    heads_in, rows_in, kv_norm, inv_freq, heads_out, rows_out, position, token,
                    T.truncmod(item, parts), parts,
                )  # fmt: skip

    return rotary_query_kv
