"""Manifold-constrained hyper-connections: entry and exit of a sublayer, and the collapse after the last layer."""

# mypy: ignore-errors
# (TVMScript: the functions below are parsed by TVM, not run by Python.)

from __future__ import annotations

import tvm
from tvm.script import tirx as T

from ..schedule import MHCSchedule
from .common import sigmoid, vector_width
from .mhc_steps import (
    DEFAULT,
    collapse,
    each_row,
    load_mixing,
    mix_vector,
    normed_sums,
    part_count,
    project_parts,
    square_part,
    sublayer_weights,
)


def mhc_pre(
    m: int, d: int, iterations: int, hc_eps: float, norm_eps: float, schedule: MHCSchedule = DEFAULT
) -> tvm.tirx.PrimFunc:
    """Collapse the residual streams and compute the mixing weights of one sublayer (mHC paper, section 4.2).

    Args:
        m: number of streams.
        d: hidden size.
        iterations: Sinkhorn-Knopp iterations; the first normalises columns only, as a softmax has done the rows.
        hc_eps: added to the pre weights, to the softmax and to every Sinkhorn divisor.
        norm_eps: of the RMS norm over all streams of a token.
        schedule: how the work is cut.

    Returns:
        PrimFunc of streams ``[B, S, m, d]``, fn ``[(2 + m) * m, m * d]``, base ``[(2 + m) * m]``, scale ``[3]``,
        collapsed ``[B, S, d]``, post ``[B, S, m]``, comb ``[B, S, m, m]``, all float32.
    """
    outputs = (2 + m) * m

    @T.prim_func(private=True, s_tir=True)
    def mhc_pre(
        streams_: T.handle,
        fn_: T.handle,
        base_: T.handle,
        scale_: T.handle,
        collapsed_: T.handle,
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
        collapsed_bsd = T.match_buffer(collapsed_, (b, s, T.int64(d)), "float32")
        post_bsm = T.match_buffer(post_, (b, s, T.int64(m)), "float32")
        comb_bsmm = T.match_buffer(comb_, (b, s, T.int64(m), T.int64(m)), "float32")
        streams = streams_bsmd.view(b * s, T.int64(m * d))
        collapsed = collapsed_bsd.view(b * s, T.int64(d))
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
            collapse(collapsed, streams, pre, row, m, d)

        project_parts(square, streams, fn, parts, b * s, outputs, m, d, schedule)
        each_row(finish, b * s, schedule)

    return mhc_pre


def mhc_post(m: int, d: int, schedule: MHCSchedule = DEFAULT) -> tvm.tirx.PrimFunc:
    """New streams: stream_k = post_k * x + sum_j comb[j, k] * stream_j (mHC paper, section 4.2).

    Args:
        m: number of streams.
        d: hidden size.
        schedule: how the work is cut.

    Returns:
        PrimFunc of x ``[B, S, d]``, streams ``[B, S, m, d]``, post ``[B, S, m]``, comb ``[B, S, m, m]``, and the new
        streams ``[B, S, m, d]``, all float32.
    """
    width = vector_width(d)

    @T.prim_func(private=True, s_tir=True)
    def mhc_post(x_: T.handle, streams_: T.handle, post_: T.handle, comb_: T.handle, mixed_: T.handle):
        T.func_attr({"tirx.noalias": True})
        b = T.int64()
        s = T.int64()
        x_bsd = T.match_buffer(x_, (b, s, T.int64(d)), "float32")
        streams_bsmd = T.match_buffer(streams_, (b, s, T.int64(m), T.int64(d)), "float32")
        post_bsm = T.match_buffer(post_, (b, s, T.int64(m)), "float32")
        comb_bsmm = T.match_buffer(comb_, (b, s, T.int64(m), T.int64(m)), "float32")
        mixed_bsmd = T.match_buffer(mixed_, (b, s, T.int64(m), T.int64(d)), "float32")
        x = x_bsd.view(b * s, T.int64(d))
        streams = streams_bsmd.view(b * s, T.int64(m * d))
        post = post_bsm.view(b * s, T.int64(m))
        comb = comb_bsmm.view(b * s, T.int64(m * m))
        mixed = mixed_bsmd.view(b * s, T.int64(m * d))

        @T.inline
        def mix(row):
            mixing = T.alloc_buffer((m, m + 1), "float32", scope="local")
            total = T.alloc_buffer((width,), "float32", scope="local")
            for k in T.unroll(m):
                load_mixing(mixing, k, post, comb, row, k, m)
            for step in range(T.int64(d // width)):
                for k in T.unroll(m):
                    mix_vector(total, mixing, k, x, streams, row, step, m, d)
                    for v in T.vectorized(width):
                        mixed[row, k * d + step * width + v] = total[v]

        each_row(mix, b * s, schedule)

    return mhc_post


def mhc_head(m: int, d: int, hc_eps: float, norm_eps: float, schedule: MHCSchedule = DEFAULT) -> tvm.tirx.PrimFunc:
    """Collapse the streams after the last layer, with weights computed from them as in `mhc_pre`.

    Args:
        m: number of streams.
        d: hidden size.
        hc_eps: added to the weights.
        norm_eps: of the RMS norm over all streams of a token.
        schedule: how the work is cut.

    Returns:
        PrimFunc of streams ``[B, S, m, d]``, fn ``[m, m * d]``, base ``[m]``, scale ``[1]``, collapsed ``[B, S, d]``,
        all float32.
    """

    @T.prim_func(private=True, s_tir=True)
    def mhc_head(streams_: T.handle, fn_: T.handle, base_: T.handle, scale_: T.handle, collapsed_: T.handle):
        T.func_attr({"tirx.noalias": True})
        b = T.int64()
        s = T.int64()
        streams_bsmd = T.match_buffer(streams_, (b, s, T.int64(m), T.int64(d)), "float32")
        fn = T.match_buffer(fn_, (T.int64(m), T.int64(m * d)), "float32")
        base = T.match_buffer(base_, (T.int64(m),), "float32")
        scale = T.match_buffer(scale_, (T.int64(1),), "float32")
        collapsed_bsd = T.match_buffer(collapsed_, (b, s, T.int64(d)), "float32")
        streams = streams_bsmd.view(b * s, T.int64(m * d))
        collapsed = collapsed_bsd.view(b * s, T.int64(d))
        parts = T.alloc_buffer((b * s, T.int64(part_count(m, d, schedule)), T.int64(m + 1)), "float32")

        @T.inline
        def square(row, part, k, first, steps):
            square_part(streams, parts, row, part, k, first, steps, m, d)

        @T.inline
        def finish(row):
            logits = T.alloc_buffer((m + 1,), "float32", scope="local")
            pre = T.alloc_buffer((m,), "float32", scope="local")
            normed_sums(logits, parts, row, m, m, d, norm_eps, schedule)
            for i in T.unroll(m):
                pre[i] = sigmoid(logits[i] * scale[0] + base[i]) + T.float32(hc_eps)
            collapse(collapsed, streams, pre, row, m, d)

        project_parts(square, streams, fn, parts, b * s, m, m, d, schedule)
        each_row(finish, b * s, schedule)

    return mhc_head
