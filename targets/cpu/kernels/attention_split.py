"""Attention of few tokens: the rows that a token sees are shared out among the threads, and the shares put together.

Each share keeps a softmax of its own, with the sink logit as the least maximum; merging brings them to the largest
maximum and adds the sink, as the steps of an online softmax do (Dao et al., "Flash-Decoding", 2023).
"""

# mypy: ignore-errors
# (TVMScript: names and loops below are parsed by TVM, not run by Python.)

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from .attention_steps import Tiles
from .common import exp, vector_width


@T.inline
def close_share(tile: Tiles, peak: Any, total: Any, peaks: Any, totals: Any, i: Any, at: Any) -> None:
    """Leave a share's softmax for `merge`."""
    for g in range(T.int64(tile.blocks)):
        for v in T.vectorized(tile.head_block):
            peaks[i, at, g * T.int64(tile.head_block) + v] = peak[g, v]
            totals[i, at, g * T.int64(tile.head_block) + v] = total[g, v]


@T.inline
def merge(tile: Tiles, partial: Any, peaks: Any, totals: Any, sinks: Any, out: Any, i: Any, j: Any, h: Any) -> None:
    """``out[i, j, h]`` from the shares of a token.

    Args:
        partial: ``[B, S * tile.shares, heads, width]`` float32, outputs before the division.
        peaks, totals: ``[B, S * tile.shares, heads]`` float32.
    """
    lanes = T.meta_var(vector_width(tile.width))
    weight = T.alloc_buffer((tile.shares,), "float32")
    acc = T.alloc_buffer((1, lanes), "float32", scope="local")
    top: T.float32 = sinks[h]
    for a in range(T.int64(tile.shares)):
        top = T.max(top, peaks[i, j * T.int64(tile.shares) + a, h])
    denominator: T.float32 = exp(sinks[h] - top)
    for a in range(T.int64(tile.shares)):
        weight[a] = exp(peaks[i, j * T.int64(tile.shares) + a, h] - top)
        denominator = denominator + weight[a] * totals[i, j * T.int64(tile.shares) + a, h]
    for a in range(T.int64(tile.shares)):
        weight[a] = weight[a] / denominator
    for c in range(T.int64(tile.width // lanes)):
        for v in T.vectorized(lanes):
            acc[0, v] = T.float32(0)
        for a in range(T.int64(tile.shares)):
            for v in T.vectorized(lanes):
                acc[0, v] = acc[0, v] + weight[a] * partial[i, j * T.int64(tile.shares) + a, h, c * T.int64(lanes) + v]
        for v in T.vectorized(lanes):
            out[i, j, h, c * T.int64(lanes) + v] = acc[0, v]
