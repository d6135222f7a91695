"""Manifold-constrained hyper-connections: entry and exit of a sublayer, and the collapse after the last layer.

The product with `fn` is cut along the flattened streams, so that a single token keeps all threads busy; the parts are
added in a fixed order, so the result depends neither on the threads nor on how many tokens there are.
"""

# mypy: ignore-errors
# ruff: noqa: B023
# (TVMScript: the functions below are parsed by TVM, not run by Python.)

from __future__ import annotations

import tvm
from tvm.script import tirx as T

from .common import exp, sigmoid, sum_lanes, vector_width

PART_VECTORS = 64
"""Vectors of the flattened streams per part: with six rows of `fn` and four tokens, 40 KiB, which stays in L1."""

ROWS_PER_TASK = 32
"""Tokens that share one reading of a part of `fn`."""

ROW_BLOCK = 4
"""Tokens per register block."""

OUTPUT_BLOCK = 6
"""Rows of `fn` per register block at most. All 24 at once would thrash: they lie a power of two apart, so in the same
cache sets. Six by `ROW_BLOCK` fill 24 registers and fit an L1 of 12 ways."""


def part_count(width: int) -> int:
    """Parts that flattened streams of `width` floats are cut into."""
    return -(-(width // vector_width(width)) // PART_VECTORS)


def output_block(outputs: int) -> int:
    """Rows of `fn` per register block: the largest divisor of `outputs` up to `OUTPUT_BLOCK`."""
    return max(size for size in range(1, OUTPUT_BLOCK + 1) if outputs % size == 0)


@T.macro
def project_block(streams, fn, parts, row, height, part, group, size, columns, width):
    """Products of `height` tokens with the `group`-th `size` rows of `fn`, over the `columns` vectors of a part."""
    vector = T.meta_var(vector_width(width))
    lanes = T.alloc_buffer((height * size, vector), "float32", scope="local")
    for a in T.unroll(height * size):
        for v in T.vectorized(vector):
            lanes[a, v] = T.float32(0)
    for j in range(columns):
        for o in T.unroll(size):
            for r in T.unroll(height):
                for v in T.vectorized(vector):
                    lanes[r * size + o, v] = (
                        lanes[r * size + o, v]
                        + streams[row + r, (part * PART_VECTORS + j) * vector + v]
                        * fn[group * size + o, (part * PART_VECTORS + j) * vector + v]
                    )
    for r in T.unroll(height):
        for o in T.unroll(size):
            sum_lanes(lanes, r * size + o, vector)
            parts[row + r, part, group * size + o] = lanes[r * size + o, 0]


@T.macro
def square_block(streams, parts, row, part, output, columns, vector):
    """The sum of squares of one token over the first `columns` vectors of a part."""
    lanes = T.alloc_buffer((1, vector), "float32", scope="local")
    for v in T.vectorized(vector):
        lanes[0, v] = T.float32(0)
    for j in range(columns):
        for v in T.vectorized(vector):
            lanes[0, v] = (
                lanes[0, v]
                + streams[row, (part * PART_VECTORS + j) * vector + v]
                * streams[row, (part * PART_VECTORS + j) * vector + v]
            )
    sum_lanes(lanes, 0, vector)
    parts[row, part, output] = lanes[0, 0]


@T.macro
def project_parts(streams, fn, parts, rows, outputs, width):
    """Per token and part of the flattened streams: the products with the rows of `fn`, then the sum of squares.

    Args:
        streams: ``[rows, width]``.
        fn: ``[outputs, width]``.
        parts: ``[rows, part_count(width), outputs + 1]``, written.
    """
    for task in T.parallel((rows + (ROWS_PER_TASK - 1)) // ROWS_PER_TASK * part_count(width)):
        part: T.int64 = task % part_count(width)
        first: T.int64 = task // part_count(width) * ROWS_PER_TASK
        count: T.int64 = T.min(rows - first, T.int64(ROWS_PER_TASK))
        columns: T.int64 = T.min(width // vector_width(width) - part * PART_VECTORS, T.int64(PART_VECTORS))
        for group in range(T.int64(outputs // output_block(outputs))):

            @T.inline
            def block(row, height):
                project_block(streams, fn, parts, row, height, part, group, output_block(outputs), columns, width)

            for i in range(count // ROW_BLOCK):
                block(first + i * ROW_BLOCK, ROW_BLOCK)
            for i in range(count % ROW_BLOCK):
                block(first + count // ROW_BLOCK * ROW_BLOCK + i, 1)
        for i in range(count):
            square_block(streams, parts, first + i, part, outputs, columns, vector_width(width))


@T.macro
def normed_sums(logits, parts, row, outputs, width, eps):
    """``logits[:outputs]`` = the products of `project_parts` as if the streams had been RMS-normed first."""
    for o in range(outputs + 1):
        logits[o] = T.float32(0)
    for part in range(T.int64(part_count(width))):
        for o in range(outputs + 1):
            logits[o] = logits[o] + parts[row, part, o]
    logits[outputs] = T.float32(1) / T.sqrt(logits[outputs] / T.float32(width) + T.float32(eps))
    for o in range(outputs):
        logits[o] = logits[o] * logits[outputs]


@T.macro
def collapse(collapsed, streams, pre, row, m, d):
    """``collapsed[row] = sum_i pre[i] * streams[row, i]``."""
    for step in range(T.int64(d // vector_width(d))):
        total = T.alloc_buffer((vector_width(d),), "float32", scope="local")
        for v in T.vectorized(vector_width(d)):
            total[v] = T.float32(0)
        for i in T.unroll(m):
            for v in T.vectorized(vector_width(d)):
                total[v] = total[v] + pre[i] * streams[row, i * d + step * vector_width(d) + v]
        for v in T.vectorized(vector_width(d)):
            collapsed[row, step * vector_width(d) + v] = total[v]


@T.macro
def normalise(comb, sums, m, outer, inner, eps):
    """Divide every ``comb[a * outer + b * inner]`` by its sum over b, plus `eps`."""
    for a in T.unroll(m):
        sums[a] = T.float32(0)
        for b in T.unroll(m):
            sums[a] = sums[a] + comb[a * outer + b * inner]
    for a in T.unroll(m):
        for b in T.unroll(m):
            comb[a * outer + b * inner] = comb[a * outer + b * inner] / (sums[a] + T.float32(eps))


@T.macro
def sinkhorn(comb, m, iterations, eps):
    """Softmax of the rows of logits `comb`, then Sinkhorn-Knopp: columns, then `iterations` - 1 times rows, columns."""
    sums = T.alloc_buffer((m,), "float32", scope="local")
    for j in T.unroll(m):
        sums[j] = comb[j * m]
        for k in T.unroll(m):
            sums[j] = T.max(sums[j], comb[j * m + k])
        for k in T.unroll(m):
            comb[j * m + k] = exp(comb[j * m + k] - sums[j])
        sums[j] = T.float32(0)
        for k in T.unroll(m):
            sums[j] = sums[j] + comb[j * m + k]
        for k in T.unroll(m):
            comb[j * m + k] = comb[j * m + k] / sums[j] + T.float32(eps)
    normalise(comb, sums, m, 1, m, eps)
    for _ in range(iterations - 1):
        normalise(comb, sums, m, m, 1, eps)
        normalise(comb, sums, m, 1, m, eps)


def mhc_pre(m: int, d: int, iterations: int, hc_eps: float, norm_eps: float) -> tvm.tirx.PrimFunc:
    """Collapse the residual streams and compute the mixing weights of one sublayer (mHC paper, section 4.2).

    Args:
        m: number of streams.
        d: hidden size.
        iterations: Sinkhorn-Knopp iterations; the first normalises columns only, as a softmax has done the rows.
        hc_eps: added to the pre weights, to the softmax and to every Sinkhorn divisor.
        norm_eps: of the RMS norm over all streams of a token.

    Returns:
        PrimFunc of streams ``[B, S, m, d]``, fn ``[(2 + m) * m, m * d]``, base ``[(2 + m) * m]``, scale ``[3]``,
        collapsed ``[B, S, d]``, post ``[B, S, m]``, comb ``[B, S, m, m]``, all float32.
    """
    outputs = (2 + m) * m
    width = m * d

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
        fn = T.match_buffer(fn_, (T.int64(outputs), T.int64(width)), "float32")
        base = T.match_buffer(base_, (T.int64(outputs),), "float32")
        scale = T.match_buffer(scale_, (T.int64(3),), "float32")
        collapsed_bsd = T.match_buffer(collapsed_, (b, s, T.int64(d)), "float32")
        post_bsm = T.match_buffer(post_, (b, s, T.int64(m)), "float32")
        comb_bsmm = T.match_buffer(comb_, (b, s, T.int64(m), T.int64(m)), "float32")
        streams = streams_bsmd.view(b * s, T.int64(width))
        collapsed = collapsed_bsd.view(b * s, T.int64(d))
        post = post_bsm.view(b * s, T.int64(m))
        comb = comb_bsmm.view(b * s, T.int64(m * m))
        parts = T.alloc_buffer((b * s, T.int64(part_count(width)), T.int64(outputs + 1)), "float32")
        project_parts(streams, fn, parts, b * s, outputs, width)
        for row in T.parallel(b * s):
            logits = T.alloc_buffer((outputs + 1,), "float32", scope="local")
            pre = T.alloc_buffer((m,), "float32", scope="local")
            mix = T.alloc_buffer((m * m,), "float32", scope="local")
            normed_sums(logits, parts, row, outputs, width, norm_eps)
            for i in T.unroll(m):
                pre[i] = sigmoid(logits[i] * scale[0] + base[i]) + T.float32(hc_eps)
                post[row, i] = T.float32(2) * sigmoid(logits[m + i] * scale[1] + base[m + i])
            for i in T.unroll(m * m):
                mix[i] = logits[2 * m + i] * scale[2] + base[2 * m + i]
            sinkhorn(mix, m, iterations, hc_eps)
            for i in T.unroll(m * m):
                comb[row, i] = mix[i]
            collapse(collapsed, streams, pre, row, m, d)

    return mhc_pre


def mhc_post(m: int, d: int) -> tvm.tirx.PrimFunc:
    """New streams: stream_k = post_k * x + sum_j comb[j, k] * stream_j (mHC paper, section 4.2).

    Args:
        m: number of streams.
        d: hidden size.

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
        streams = streams_bsmd.view(b * s, T.int64(m), T.int64(d))
        post = post_bsm.view(b * s, T.int64(m))
        comb = comb_bsmm.view(b * s, T.int64(m), T.int64(m))
        mixed = mixed_bsmd.view(b * s, T.int64(m), T.int64(d))
        for row in T.parallel(b * s):
            for step in range(T.int64(d // width)):
                for k in T.unroll(m):
                    total = T.alloc_buffer((width,), "float32", scope="local")
                    for v in T.vectorized(width):
                        total[v] = post[row, k] * x[row, step * width + v]
                    for j in T.unroll(m):
                        for v in T.vectorized(width):
                            total[v] = total[v] + comb[row, j, k] * streams[row, j, step * width + v]
                    for v in T.vectorized(width):
                        mixed[row, k, step * width + v] = total[v]

    return mhc_post


def mhc_head(m: int, d: int, hc_eps: float, norm_eps: float) -> tvm.tirx.PrimFunc:
    """Collapse the streams after the last layer, with weights computed from them as in `mhc_pre`.

    Args:
        m: number of streams.
        d: hidden size.
        hc_eps: added to the weights.
        norm_eps: of the RMS norm over all streams of a token.

    Returns:
        PrimFunc of streams ``[B, S, m, d]``, fn ``[m, m * d]``, base ``[m]``, scale ``[1]``, collapsed ``[B, S, d]``,
        all float32.
    """
    width = m * d

    @T.prim_func(private=True, s_tir=True)
    def mhc_head(streams_: T.handle, fn_: T.handle, base_: T.handle, scale_: T.handle, collapsed_: T.handle):
        T.func_attr({"tirx.noalias": True})
        b = T.int64()
        s = T.int64()
        streams_bsmd = T.match_buffer(streams_, (b, s, T.int64(m), T.int64(d)), "float32")
        fn = T.match_buffer(fn_, (T.int64(m), T.int64(width)), "float32")
        base = T.match_buffer(base_, (T.int64(m),), "float32")
        scale = T.match_buffer(scale_, (T.int64(1),), "float32")
        collapsed_bsd = T.match_buffer(collapsed_, (b, s, T.int64(d)), "float32")
        streams = streams_bsmd.view(b * s, T.int64(width))
        collapsed = collapsed_bsd.view(b * s, T.int64(d))
        parts = T.alloc_buffer((b * s, T.int64(part_count(width)), T.int64(m + 1)), "float32")
        project_parts(streams, fn, parts, b * s, m, width)
        for row in T.parallel(b * s):
            logits = T.alloc_buffer((m + 1,), "float32", scope="local")
            pre = T.alloc_buffer((m,), "float32", scope="local")
            normed_sums(logits, parts, row, m, width, norm_eps)
            for i in T.unroll(m):
                pre[i] = sigmoid(logits[i] * scale[0] + base[i]) + T.float32(hc_eps)
            collapse(collapsed, streams, pre, row, m, d)

    return mhc_head
