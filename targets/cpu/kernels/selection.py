"""Choosing the k best of a stream of scores, deterministically: the selection steps of LightningIndex.

A score and its row make one int64 key that orders by descending score, then ascending row; keys are therefore distinct
and any selection of the k largest gives the same answer. Candidates that reach the threshold are appended to a buffer;
when it is full, a binary search over the key's bits finds a new threshold that keeps exactly k. The work is bounded for
any order of the scores: a search comes after no fewer than `_BUFFER_ROOM` appended keys.
"""

# mypy: ignore-errors
# (TVMScript: names and loops below are parsed by TVM, not run by Python.)

from __future__ import annotations

from typing import Any

from tvm.ir import Expr
from tvm.script import tirx as T

_LANES = 8  # int64 lanes of one vector
_BUFFER_ROOM = 256  # at least; `top_k` where that is more
LOWEST_KEY = -(2**63)
_ROW_MASK = 2**32 - 1
_RANK_TILE = 4


def buffer_size(top_k: int) -> int:
    """Length of a candidate buffer: room for `top_k` kept keys and as many new ones, in whole vectors."""
    return -(-(top_k + max(top_k, _BUFFER_ROOM)) // _LANES) * _LANES


def key(score: Expr, row: Expr) -> Expr:
    """The int64 key of a float32 score and an int64 row below 2^32; -0.0 equals 0.0."""
    bits = T.reinterpret("int32", T.if_then_else(score == T.float32(0), T.float32(0), score))
    ordered = T.bitwise_xor(bits, T.bitwise_and(T.shift_right(bits, T.int32(31)), T.int32(0x7FFFFFFF)))
    return T.bitwise_or(T.shift_left(T.cast(ordered, "int64"), T.int64(32)), T.int64(_ROW_MASK) - row)


def row_of(one: Expr) -> Expr:
    """The row that `key` put into a key."""
    return T.int64(_ROW_MASK) - T.bitwise_and(one, T.int64(_ROW_MASK))


@T.inline
def pad_keys(keys: Any, count: Any) -> None:
    """Fill up the last vector, so that the vector loops below count nothing extra."""
    for v in range((T.int64(0) - count) % T.int64(_LANES)):
        keys[count + v] = T.int64(LOWEST_KEY)


@T.inline
def prune(top_k: int, keys: Any, count: Any, threshold: Any) -> None:
    """Keep the `top_k` largest of ``keys[:count]`` where there are more; later keys must reach `threshold`."""
    if count > T.int64(top_k):
        pad_keys(keys, count)
        tally = T.alloc_buffer((_LANES,), "int64", scope="local")
        reached: T.int64 = count
        bit: T.int64 = T.int64(63)
        threshold = T.int64(LOWEST_KEY)
        while reached != T.int64(top_k):
            # LOWEST_KEY + 2^63 is zero: the sign bit is tried like the others, from the top.
            trial: T.let = threshold + T.shift_left(T.int64(1), bit)
            for v in T.vectorized(_LANES):
                tally[v] = T.int64(0)
            for x in range((count + T.int64(_LANES - 1)) // T.int64(_LANES)):
                for v in T.vectorized(_LANES):
                    tally[v] = tally[v] + T.cast(keys[x * T.int64(_LANES) + v] >= trial, "int64")
            total: T.int64 = T.int64(0)
            for v in T.unroll(_LANES):
                total = total + tally[v]
            if total >= T.int64(top_k):
                threshold = trial
                reached = total
            bit = bit - T.int64(1)
        kept: T.int64 = T.int64(0)
        for x in range(count):
            one: T.let = keys[x]
            keys[kept] = one
            kept = kept + T.cast(one >= threshold, "int64")
        count = kept


@T.inline
def push(top_k: int, keys: Any, count: Any, threshold: Any, one: Any) -> None:
    """Append the key `one` if it reaches the threshold, making room first."""
    if one >= threshold:
        keys[count] = one
        count = count + T.int64(1)
        if count == T.int64(buffer_size(top_k)):
            prune(top_k, keys, count, threshold)


@T.inline
def write_ranked(top_k: int, keys: Any, count: Any, out: Any, i: Any, j: Any) -> None:
    """``out[i, j]`` = rows of ``keys[:count]`` by descending key, then -1. A key's place is how many keys exceed it."""
    pad_keys(keys, count)
    for group in range((count + T.int64(_RANK_TILE - 1)) // T.int64(_RANK_TILE)):
        above = T.alloc_buffer((_RANK_TILE, _LANES), "int64", scope="local")
        pivots = T.alloc_buffer((_RANK_TILE,), "int64", scope="local")
        for a in T.unroll(_RANK_TILE):
            pivots[a] = keys[T.min(group * T.int64(_RANK_TILE) + a, count - T.int64(1))]
            for v in T.vectorized(_LANES):
                above[a, v] = T.int64(0)
        for x in range((count + T.int64(_LANES - 1)) // T.int64(_LANES)):
            for a in T.unroll(_RANK_TILE):
                for v in T.vectorized(_LANES):
                    above[a, v] = above[a, v] + T.cast(keys[x * T.int64(_LANES) + v] > pivots[a], "int64")
        for a in T.unroll(_RANK_TILE):
            rank: T.int64 = T.int64(0)
            for v in T.unroll(_LANES):
                rank = rank + above[a, v]
            out[i, j, rank] = row_of(pivots[a])
    for a in range(T.int64(top_k) - count):
        out[i, j, count + a] = T.int64(-1)
