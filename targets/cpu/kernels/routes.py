"""Expert routing: from router logits to the experts of each token and their weights."""

# mypy: ignore-errors
# (TVMScript: the functions below are parsed by TVM, not run by Python.)

from __future__ import annotations

from typing import Any

import tvm
from tvm.script import tirx as T

LOWEST = -3.4028234663852886e38
"""The lowest float32: below every score."""


def score(logit: Any) -> Any:
    """sqrt(softplus(logit)) of a float32 expression, without overflow and accurate for very negative logits."""
    return T.sqrt(T.max(logit, T.float32(0)) + T.log1p(T.exp(T.float32(0) - T.abs(logit))))


@T.macro
def normalise(weights, row, top_k, scaling):
    """Scale ``weights[row]`` to sum to `scaling`."""
    total = T.alloc_buffer((1,), "float32", scope="local")
    total[0] = T.float32(0)
    for choice in range(T.int64(top_k)):
        total[0] = total[0] + weights[row, choice]
    for choice in range(T.int64(top_k)):
        weights[row, choice] = weights[row, choice] / (total[0] + T.float32(1e-20)) * T.float32(scaling)


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
            biased = T.alloc_buffer((experts,), "float32", scope="local")
            best = T.alloc_buffer((1,), "float32", scope="local")
            at = T.alloc_buffer((1,), "int64", scope="local")
            for e in range(T.int64(experts)):
                biased[e] = score(logits[row, e]) + bias[e]
            for choice in range(T.int64(top_k)):
                best[0] = T.float32(LOWEST)
                at[0] = T.int64(0)
                for e in range(T.int64(experts)):
                    if biased[e] > best[0]:
                        best[0] = biased[e]
                        at[0] = e
                biased[at[0]] = T.float32(LOWEST)
                indices[row, choice] = at[0]
                weights[row, choice] = score(logits[row, at[0]])
            normalise(weights, row, top_k, scaling)

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
            for choice in range(T.int64(top_k)):
                indices[row, choice] = table[ids[row], choice]
                weights[row, choice] = score(logits[row, indices[row, choice]])
            normalise(weights, row, top_k, scaling)

    return hash_route
