"""Expert routing: from router logits to the experts of each token and their weights."""

# mypy: ignore-errors
# (TVMScript: the functions below are parsed by TVM, not run by Python.)

from __future__ import annotations

from typing import Any

import tvm
from tvm.script import tirx as T

from .common import exp, vector_width

LOWEST = -3.4028234663852886e38
"""The lowest float32: below every score."""


def atanh_ratio(square: Any) -> Any:
    """``atanh(s) / s`` of a float32 expression of ``s**2`` in [0, 1/9]: seven terms of the series reach float32."""
    ratio = T.float32(1 / 13)
    for odd in (11, 9, 7, 5, 3, 1):
        ratio = ratio * square + T.float32(1 / odd)
    return ratio


@T.macro
def to_scores(values, count, width):
    """``values[i] = sqrt(softplus(values[i]))`` for i < `count`, without overflow, in vectors of `width` (both static).

    With ``half = e**(-|x| / 2)`` and ``u = half**2``, softplus is ``max(x, 0) + log1p(u)``, and ``log1p(u) / u`` is
    ``2 / (2 + u) * atanh(s) / s`` for ``s = u / (2 + u)``. Below 0 the factor `half` stays outside of the root, so that
    scores keep their precision down to x = -174, where ``e**x`` itself is long zero.
    """
    half = T.alloc_buffer((width,), "float32")
    inverse = T.alloc_buffer((width,), "float32")
    square = T.alloc_buffer((width,), "float32")
    ratio = T.alloc_buffer((width,), "float32")
    for step in range(T.int64(count // width)):
        # Steps of their own: an expression is a tree, and a factor that is used twice would be computed twice.
        for v in T.vectorized(width):
            half[v] = exp(T.float32(-0.5) * T.abs(values[step * width + v]))
        for v in T.vectorized(width):
            inverse[v] = T.float32(1) / (half[v] * half[v] + T.float32(2))
        for v in T.vectorized(width):
            square[v] = half[v] * half[v] * inverse[v]
        for v in T.vectorized(width):
            square[v] = square[v] * square[v]
        for v in T.vectorized(width):
            ratio[v] = T.float32(2) * inverse[v] * atanh_ratio(square[v])
        for v in T.vectorized(width):
            values[step * width + v] = T.Select(
                values[step * width + v] > T.float32(0),
                T.sqrt(values[step * width + v] + half[v] * half[v] * ratio[v]),
                T.sqrt(ratio[v]) * half[v],
            )


@T.macro
def weigh(chosen, weights, row, top_k, scaling):
    """``weights[row]`` = the `top_k` scores in `chosen`, scaled to sum to `scaling`."""
    total: T.float32 = T.float32(0)
    for choice in T.unroll(top_k):
        total = total + chosen[choice]
    for choice in T.unroll(top_k):
        weights[row, choice] = chosen[choice] / (total + T.float32(1e-20)) * T.float32(scaling)


@T.macro
def choose(logits, bias, weights, indices, row, experts, top_k, scaling):
    """The route of one row: the `top_k` highest ``score + bias`` in order, weighted by their scores.

    Args:
        logits: ``[rows, experts]`` float32.
        bias: ``[experts]`` float32.
        weights: ``[rows, top_k]`` float32, written.
        indices: ``[rows, top_k]`` int64, written; of equal ones the smaller index comes first.
        row: which row.
        experts, top_k, scaling: static.
    """
    scores = T.alloc_buffer((experts,), "float32")
    best = T.alloc_buffer((top_k,), "float32")
    for e in range(T.int64(experts)):
        scores[e] = logits[row, e]
    to_scores(scores, experts, vector_width(experts))
    for choice in T.unroll(top_k):
        best[choice] = T.float32(LOWEST)
        indices[row, choice] = T.int64(0)
    # One pass: few experts come after the first `top_k` and are still better than the last of those kept.
    for e in range(T.int64(experts)):
        biased: T.float32 = scores[e] + bias[e]
        if biased > best[top_k - 1]:
            place: T.int64 = T.int64(top_k - 1)
            while place > T.int64(0) and best[T.max(place - 1, T.int64(0))] < biased:
                best[place] = best[place - 1]
                indices[row, place] = indices[row, place - 1]
                place = place - T.int64(1)
            best[place] = biased
            indices[row, place] = e
    for choice in T.unroll(top_k):
        best[choice] = scores[indices[row, choice]]
    weigh(best, weights, row, top_k, scaling)


def topk_route(experts: int, top_k: int, scaling: float) -> tvm.tirx.PrimFunc:
    """Choose `top_k` experts per token by sqrt(softplus(logit)) + bias (V4 paper, section 2.1).

    Args:
        experts: E, number of experts.
        top_k: experts per token, at most E.
        scaling: what a token's weights sum to.

    Returns:
        PrimFunc of logits ``[B, S, E]`` float32, bias ``[E]`` float32, weights ``[B, S, top_k]`` float32 (unbiased
        scores, normalised), indices ``[B, S, top_k]`` int64 by descending biased score, ties to the smaller index.
    """

    @T.prim_func(private=True, s_tir=True)
    def topk_route(logits_: T.handle, bias_: T.handle, weights_: T.handle, indices_: T.handle):
        T.func_attr({"tirx.noalias": True})
        b = T.int64()
        s = T.int64()
        logits_bse = T.match_buffer(logits_, (b, s, T.int64(experts)), "float32")
        bias = T.match_buffer(bias_, (T.int64(experts),), "float32")
        weights_bsk = T.match_buffer(weights_, (b, s, T.int64(top_k)), "float32")
        indices_bsk = T.match_buffer(indices_, (b, s, T.int64(top_k)), "int64")
        logits = logits_bse.view(b * s, T.int64(experts))
        weights = weights_bsk.view(b * s, T.int64(top_k))
        indices = indices_bsk.view(b * s, T.int64(top_k))
        for row in T.parallel(b * s):
            choose(logits, bias, weights, indices, row, experts, top_k, scaling)

    return topk_route


def hash_route(experts: int, top_k: int, scaling: float) -> tvm.tirx.PrimFunc:
    """Experts by token id, weighted by sqrt(softplus(logit)) (V4 paper, section 2.1).

    Args:
        experts: E, number of experts.
        top_k: experts per token.
        scaling: what a token's weights sum to.

    Returns:
        PrimFunc of logits ``[B, S, E]`` float32, input_ids ``[B, S]`` int64, table ``[V, top_k]`` int64 of experts,
        weights ``[B, S, top_k]`` float32, indices ``[B, S, top_k]`` int64 in the table's order.
    """

    @T.prim_func(private=True, s_tir=True)
    def hash_route(logits_: T.handle, ids_: T.handle, table_: T.handle, weights_: T.handle, indices_: T.handle):
        T.func_attr({"tirx.noalias": True})
        b = T.int64()
        s = T.int64()
        vocab = T.int64()
        logits_bse = T.match_buffer(logits_, (b, s, T.int64(experts)), "float32")
        ids_bs = T.match_buffer(ids_, (b, s), "int64")
        table = T.match_buffer(table_, (vocab, T.int64(top_k)), "int64")
        weights_bsk = T.match_buffer(weights_, (b, s, T.int64(top_k)), "float32")
        indices_bsk = T.match_buffer(indices_, (b, s, T.int64(top_k)), "int64")
        logits = logits_bse.view(b * s, T.int64(experts))
        ids = ids_bs.view(b * s)
        weights = weights_bsk.view(b * s, T.int64(top_k))
        indices = indices_bsk.view(b * s, T.int64(top_k))
        for row in range(b * s):
            chosen = T.alloc_buffer((top_k,), "float32")
            for choice in range(T.int64(top_k)):
                indices[row, choice] = table[ids[row], choice]
                chosen[choice] = logits[row, indices[row, choice]]
            to_scores(chosen, top_k, vector_width(top_k))
            weigh(chosen, weights, row, top_k, scaling)

    return hash_route
