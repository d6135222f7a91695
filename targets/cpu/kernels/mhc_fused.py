"""Hyper-connections fused with what stands next to them: a sublayer's exit, the next one's entry, and its norm.

In `mhc_post_pre_norm` the task that mixes a part of the streams also multiplies it with `fn`, while it is in cache.
"""

# mypy: ignore-errors
# (TVMScript: the functions below are parsed by TVM, not run by Python.)

from __future__ import annotations

import tvm
from tvm.script import tirx as T

from ..schedule import MHCSchedule
from .common import sum_lanes, vector_width
from .mhc_steps import (
    DEFAULT,
    collapse,
    each_row,
    load_mixing,
    mix_vector,
    part_count,
    project_parts,
    square_part,
    sublayer_weights,
)
from .rms_norm import row_norm


@T.macro
def mix_part(mixed, parts, x, streams, post, comb, row, part, k, first, steps, output, m, d):
    """A `prepare` of `project_parts`: a part of new stream k, and its sum of squares."""
    vector = T.meta_var(vector_width(d))
    mixing = T.alloc_buffer((1, m + 1), "float32", scope="local")
    total = T.alloc_buffer((vector,), "float32", scope="local")
    lanes = T.alloc_buffer((1, vector), "float32", scope="local")
    load_mixing(mixing, 0, post, comb, row, k, m)
    for v in T.vectorized(vector):
        lanes[0, v] = T.float32(0)
    for j in range(steps):
        mix_vector(total, mixing, 0, x, streams, row, first + j, m, d)
        for v in T.vectorized(vector):
            mixed[row, k * d + (first + j) * vector + v] = total[v]
        for v in T.vectorized(vector):
            lanes[0, v] = lanes[0, v] + total[v] * total[v]
    sum_lanes(lanes, 0, vector)
    parts[row, part, output] = lanes[0, 0]


def mhc_pre_norm(
    m: int, d: int, iterations: int, hc_eps: float, norm_eps: float, eps: float, schedule: MHCSchedule = DEFAULT
) -> tvm.tirx.PrimFunc:
    """Entry of a sublayer and the RMS norm of its input (mHC paper, section 4.2).

    Args:
        m: number of streams.
        d: hidden size.
        iterations: Sinkhorn-Knopp iterations; the first normalises columns only, as a softmax has done the rows.
        hc_eps: added to the pre weights, to the softmax and to every Sinkhorn divisor.
        norm_eps: of the RMS norm over all streams of a token.
        eps: of the RMS norm of the collapsed streams.
        schedule: how the work is cut.

    Returns:
        PrimFunc of streams ``[B, S, m, d]``, fn ``[(2 + m) * m, m * d]``, base ``[(2 + m) * m]``, scale ``[3]``, norm
        ``[d]``, y ``[B, S, d]``, post ``[B, S, m]``, comb ``[B, S, m, m]``, all float32.
    """
    outputs = (2 + m) * m
    norm_row = row_norm(d, eps)

    @T.prim_func(private=True, s_tir=True)
    def mhc_pre_norm(
        streams_: T.handle,
        fn_: T.handle,
        base_: T.handle,
        scale_: T.handle,
        norm_: T.handle,
        y_: T.handle,
        post_: T.handle,
        comb_: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        b = T.int64()
        s = T.int64()
        streams_bsmd = T.match_buffer(streams_, (b, s, T.int64(m), T.int64(d)), "float32")
        fn = T.match_buffer(fn_, (T.int64(outputs), T.int64(m * d)), "float32")
        base = T.match_buffer(base_, (T.int64(outputs),), "float32")
        scale = T.match_buffer(scale_, (T.int64(3),), "float32")
        norm = T.match_buffer(norm_, (T.int64(d),), "float32")
        y_bsd = T.match_buffer(y_, (b, s, T.int64(d)), "float32")
        post_bsm = T.match_buffer(post_, (b, s, T.int64(m)), "float32")
        comb_bsmm = T.match_buffer(comb_, (b, s, T.int64(m), T.int64(m)), "float32")
        streams = streams_bsmd.view(b * s, T.int64(m * d))
        y = y_bsd.view(b * s, T.int64(d))
        post = post_bsm.view(b * s, T.int64(m))
        comb = comb_bsmm.view(b * s, T.int64(m * m))
        parts = T.alloc_buffer((b * s, T.int64(part_count(m, d, schedule)), T.int64(outputs + 1)), "float32")

        @T.inline
        def square(row, part, k, first, steps):
            square_part(streams, parts, row, part, k, first, steps, outputs, d)

        @T.inline
        def finish(row):
            pre = T.alloc_buffer((m,), "float32", scope="local")
            sublayer_weights(pre, post, comb, parts, base, scale, row, m, d, iterations, hc_eps, norm_eps, schedule)
            collapse(y, streams, pre, row, m, d)
            norm_row(y, norm, y, row)

        project_parts(square, streams, fn, parts, b * s, outputs, m, d, schedule)
        each_row(finish, b * s, schedule)

    return mhc_pre_norm


def mhc_post_pre_norm(
    m: int, d: int, iterations: int, hc_eps: float, norm_eps: float, eps: float, schedule: MHCSchedule = DEFAULT
) -> tvm.tirx.PrimFunc:
    """Exit of a sublayer, entry of the next and the RMS norm of its input (mHC paper, section 4.2).

    Args:
        m: number of streams.
        d: hidden size.
        iterations: Sinkhorn-Knopp iterations; the first normalises columns only, as a softmax has done the rows.
        hc_eps: added to the pre weights, to the softmax and to every Sinkhorn divisor.
        norm_eps: of the RMS norm over all streams of a token.
        eps: of the RMS norm of the collapsed streams.
        schedule: how the work is cut.

    Returns:
        PrimFunc of x ``[B, S, d]``, streams ``[B, S, m, d]``, post ``[B, S, m]``, comb ``[B, S, m, m]``, fn
        ``[(2 + m) * m, m * d]``, base ``[(2 + m) * m]``, scale ``[3]``, norm ``[d]``, mixed ``[B, S, m, d]``, y
        ``[B, S, d]``, next_post ``[B, S, m]``, next_comb ``[B, S, m, m]``, all float32.
    """
    outputs = (2 + m) * m
    norm_row = row_norm(d, eps)

    @T.prim_func(private=True, s_tir=True)
    def mhc_post_pre_norm(
        x_: T.handle,
        streams_: T.handle,
        post_: T.handle,
        comb_: T.handle,
        fn_: T.handle,
        base_: T.handle,
        scale_: T.handle,
        norm_: T.handle,
        mixed_: T.handle,
        y_: T.handle,
        next_post_: T.handle,
        next_comb_: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        b = T.int64()
        s = T.int64()
        x_bsd = T.match_buffer(x_, (b, s, T.int64(d)), "float32")
        streams_bsmd = T.match_buffer(streams_, (b, s, T.int64(m), T.int64(d)), "float32")
        post_bsm = T.match_buffer(post_, (b, s, T.int64(m)), "float32")
        comb_bsmm = T.match_buffer(comb_, (b, s, T.int64(m), T.int64(m)), "float32")
        fn = T.match_buffer(fn_, (T.int64(outputs), T.int64(m * d)), "float32")
        base = T.match_buffer(base_, (T.int64(outputs),), "float32")
        scale = T.match_buffer(scale_, (T.int64(3),), "float32")
        norm = T.match_buffer(norm_, (T.int64(d),), "float32")
        mixed_bsmd = T.match_buffer(mixed_, (b, s, T.int64(m), T.int64(d)), "float32")
        y_bsd = T.match_buffer(y_, (b, s, T.int64(d)), "float32")
        next_post_bsm = T.match_buffer(next_post_, (b, s, T.int64(m)), "float32")
        next_comb_bsmm = T.match_buffer(next_comb_, (b, s, T.int64(m), T.int64(m)), "float32")
        x = x_bsd.view(b * s, T.int64(d))
        streams = streams_bsmd.view(b * s, T.int64(m * d))
        post = post_bsm.view(b * s, T.int64(m))
        comb = comb_bsmm.view(b * s, T.int64(m * m))
        mixed = mixed_bsmd.view(b * s, T.int64(m * d))
        y = y_bsd.view(b * s, T.int64(d))
        next_post = next_post_bsm.view(b * s, T.int64(m))
        next_comb = next_comb_bsmm.view(b * s, T.int64(m * m))
        parts = T.alloc_buffer((b * s, T.int64(part_count(m, d, schedule)), T.int64(outputs + 1)), "float32")

        @T.inline
        def mix(row, part, k, first, steps):
            mix_part(mixed, parts, x, streams, post, comb, row, part, k, first, steps, outputs, m, d)

        @T.inline
        def finish(row):
            pre = T.alloc_buffer((m,), "float32", scope="local")
            sublayer_weights(
                pre, next_post, next_comb, parts, base, scale, row, m, d, iterations, hc_eps, norm_eps, schedule
            )
            collapse(y, mixed, pre, row, m, d)
            norm_row(y, norm, y, row)

        project_parts(mix, mixed, fn, parts, b * s, outputs, m, d, schedule)
        each_row(finish, b * s, schedule)

    return mhc_post_pre_norm
