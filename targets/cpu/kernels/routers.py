"""The routers: from a token to the weights of its experts in one kernel, the product with the router matrix included.

Behind the product, a row's route is short: for a few rows it runs on the calling thread, where starting the others
would take longer than the work.
"""

# mypy: ignore-errors
# (TVMScript: the functions below are parsed by TVM, not run by Python.)

from __future__ import annotations

import tvm
from tvm.script import tirx as T

from ..schedule import ProductSchedule
from .common import partial_sums, sum_lanes, vector_width
from .linear import projection
from .packing import PANEL, panels
from .routes import choose, to_scores, weigh

_SERIAL_SCORES = 1 << 10
"""Scores that one thread computes and ranks in the time it takes to start the others."""

_SERIAL_PRODUCTS = 1 << 16
"""Elements of router rows that one thread multiplies in that time."""


def topk_router(
    experts: int, d: int, top_k: int, scaling: float, weight_dtype: str = "float32",
    schedule: ProductSchedule | None = None,
) -> tvm.tirx.PrimFunc:  # fmt: skip
    """The route of ``x @ weight.T`` by sqrt(softplus(logit)) + bias (V4 paper, section 2.1).

    Args:
        experts: E, number of experts.
        d: hidden size.
        top_k: experts per token, at most E.
        scaling: what a token's weights sum to.
        weight_dtype: ``float32`` or ``bfloat16`` (widened in registers; sums are float32).
        schedule: how the product is cut; by default as with AVX-512.

    Returns:
        PrimFunc of x ``[B, S, d]`` float32, weight ``[ceil(E / PANEL), d, PANEL]`` from `pack_rows`, bias ``[E]``
        float32, weights ``[B, S, top_k]`` float32, indices ``[B, S, top_k]`` int64, both as `topk_route` gives them.
    """
    project = projection([experts], d, schedule or ProductSchedule().for_shape(panels(experts), d))

    @T.prim_func(private=True, s_tir=True)
    def topk_router(x_: T.handle, weight_: T.handle, bias_: T.handle, weights_: T.handle, indices_: T.handle):
        T.func_attr({"tirx.noalias": True})
        b = T.int64()
        s = T.int64()
        x_bsd = T.match_buffer(x_, (b, s, T.int64(d)), "float32")
        weight = T.match_buffer(weight_, (T.int64(panels(experts)), T.int64(d), T.int64(PANEL)), weight_dtype)
        bias = T.match_buffer(bias_, (T.int64(experts),), "float32")
        weights_bsk = T.match_buffer(weights_, (b, s, T.int64(top_k)), "float32")
        indices_bsk = T.match_buffer(indices_, (b, s, T.int64(top_k)), "int64")
        x = x_bsd.view(b * s, T.int64(d))
        weights = weights_bsk.view(b * s, T.int64(top_k))
        indices = indices_bsk.view(b * s, T.int64(top_k))
        logits = T.alloc_buffer((b * s, T.int64(experts)), "float32")
        project(x, weight, [logits], b * s)
        if b * s * T.int64(experts) <= T.int64(_SERIAL_SCORES):
            for row in range(b * s):
                choose(logits, bias, weights, indices, row, experts, top_k, scaling)
        else:
            for row in T.parallel(b * s):
                choose(logits, bias, weights, indices, row, experts, top_k, scaling)

    return topk_router


def hash_router(experts: int, d: int, top_k: int, scaling: float) -> tvm.tirx.PrimFunc:
    """The weights of experts chosen by token id, by sqrt(softplus(logit)) (V4 paper, section 2.1).

    Of the router matrix, only the rows of a token's experts are read.

    Args:
        experts: E, number of experts.
        d: hidden size.
        top_k: experts per token.
        scaling: what a token's weights sum to.

    Returns:
        PrimFunc of x ``[B, S, d]`` float32, weight ``[E, d]`` float32, indices ``[B, S, top_k]`` int64 below E, weights
        ``[B, S, top_k]`` float32.
    """
    width = vector_width(d)
    steps = d // width
    sums = partial_sums(steps)

    @T.macro
    def route(x, weight, indices, weights, row):
        lanes = T.alloc_buffer((sums, width), "float32")
        chosen = T.alloc_buffer((top_k,), "float32")
        for choice in range(T.int64(top_k)):
            expert: T.int64 = indices[row, choice]
            for a in T.unroll(sums):
                for v in T.vectorized(width):
                    lanes[a, v] = T.float32(0)
            for step in range(T.int64(steps // sums)):
                for a in T.unroll(sums):
                    for v in T.vectorized(width):
                        lanes[a, v] = (
                            lanes[a, v]
                            + x[row, (step * sums + a) * width + v] * weight[expert, (step * sums + a) * width + v]
                        )
            for a in T.unroll(sums - 1):
                for v in T.vectorized(width):
                    lanes[0, v] = lanes[0, v] + lanes[a + 1, v]
            sum_lanes(lanes, 0, width)
            chosen[choice] = lanes[0, 0]
        to_scores(chosen, top_k, vector_width(top_k))
        weigh(chosen, weights, row, top_k, scaling)

    @T.prim_func(private=True, s_tir=True)
    def hash_router(x_: T.handle, weight_: T.handle, indices_: T.handle, weights_: T.handle):
        T.func_attr({"tirx.noalias": True})
        b = T.int64()
        s = T.int64()
        x_bsd = T.match_buffer(x_, (b, s, T.int64(d)), "float32")
        weight = T.match_buffer(weight_, (T.int64(experts), T.int64(d)), "float32")
        indices_bsk = T.match_buffer(indices_, (b, s, T.int64(top_k)), "int64")
        weights_bsk = T.match_buffer(weights_, (b, s, T.int64(top_k)), "float32")
        x = x_bsd.view(b * s, T.int64(d))
        indices = indices_bsk.view(b * s, T.int64(top_k))
        weights = weights_bsk.view(b * s, T.int64(top_k))
        if b * s * T.int64(top_k * d) <= T.int64(_SERIAL_PRODUCTS):
            for row in range(b * s):
                route(x, weight, indices, weights, row)
        else:
            for row in T.parallel(b * s):
                route(x, weight, indices, weights, row)

    return hash_router
