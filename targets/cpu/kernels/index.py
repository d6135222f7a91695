"""LightningIndex on the CPU: score every finished index row against a token's index heads and keep the best k.

A token's queries are transposed so that heads are lanes: a row's element is broadcast against vectors of heads, which
needs no sum over lanes until the heads are weighted; queries that come unrotated are rotated on that way. Candidates
go through a bounded buffer (`selection`), so the scratch does not grow with the number of rows. With few tokens, the
rows are cut into ranges for the threads.
"""

# mypy: ignore-errors
# (TVMScript: names and loops below are parsed by TVM, not run by Python.)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from ..schedule import IndexSchedule
from .common import VECTOR, sum_lanes
from .rope import fill_angles
from .row_formats import CacheRows, FP4Rows, cache_rows
from .selection import LOWEST_KEY, buffer_size, key, prune, push, write_ranked

DEFAULT = IndexSchedule()


@T.inline
def score_rows(
    tile: int,
    vectors: int,
    groups: int,
    width: int,
    packed: Any,
    weights: Any,
    stored: CacheRows,
    index_rows: Any,
    lines: Any,
    i: Any,
    first: Any,
    fresh: Any,
) -> None:
    """``fresh[r]`` = key of row ``first + r``, r < tile; its score is the weighted sum over heads of relu(q . k).

    Narrow rows are read into ``lines [tile, width]`` first.
    """
    if stored.narrow:
        for r in T.unroll(tile):
            stored.read(lines, r, index_rows, i, first + r)
    sums = T.alloc_buffer((tile, VECTOR), "float32", scope="local")
    for r in T.unroll(tile):
        for v in T.vectorized(VECTOR):
            sums[r, v] = T.float32(0)
    for group in range(T.int64(groups)):
        dot = T.alloc_buffer((tile, vectors, VECTOR), "float32", scope="local")
        for r in T.unroll(tile):
            for u in T.unroll(vectors):
                for v in T.vectorized(VECTOR):
                    dot[r, u, v] = T.float32(0)
        for d in range(T.int64(width)):
            for r in T.unroll(tile):
                for u in T.unroll(vectors):
                    for v in T.vectorized(VECTOR):
                        if stored.narrow:
                            dot[r, u, v] = dot[r, u, v] + lines[r, d] * packed[group, d, u * T.int64(VECTOR) + v]
                        else:
                            dot[r, u, v] = (
                                dot[r, u, v] + index_rows[i, first + r, d] * packed[group, d, u * T.int64(VECTOR) + v]
                            )
        for r in T.unroll(tile):
            for u in T.unroll(vectors):
                for v in T.vectorized(VECTOR):
                    sums[r, v] = (
                        sums[r, v] + T.max(dot[r, u, v], T.float32(0)) * weights[group, u * T.int64(VECTOR) + v]
                    )
    for r in T.unroll(tile):
        sum_lanes(sums, r, VECTOR)
        fresh[r] = key(sums[r, 0], first + r)


@dataclass(frozen=True)
class Indexer:
    """The sizes of one indexer, and how its heads and rows are cut."""

    heads: int
    width: int
    ratio: int
    top_k: int
    rotary_width: int
    """Trailing dims of the queries to rotate; 0 where they come rotated."""
    stored: CacheRows
    schedule: IndexSchedule

    def place(self, d: Any) -> Any:
        """Where dim `d` lies in rows as they are read."""
        return self.stored.place(d) if isinstance(self.stored, FP4Rows) else d

    @property
    def vectors(self) -> int:
        """Vectors of heads in a group: the number of them, or a divisor of it, up to the schedule's."""
        return max(u for u in range(1, self.schedule.head_vectors + 1) if -(-self.heads // VECTOR) % u == 0)

    @property
    def groups(self) -> int:
        return -(-self.heads // VECTOR) // self.vectors

    @property
    def lanes(self) -> int:
        """Heads in a group."""
        return self.vectors * VECTOR

    @property
    def tile(self) -> int:
        """Rows that are scored at once."""
        return self.schedule.accumulators // self.vectors


@T.inline
def pack_queries(
    x: Indexer,
    q: Any,
    weights: Any,
    inv_freq: Any,
    packed: Any,
    head_weights: Any,
    i: Any,
    j: Any,
    position: Any,
) -> None:
    """Queries of a token at `position` as ``packed[group, d, head]``, rotated if they are not, and its head weights."""
    if x.rotary_width > 0:
        cosines = T.alloc_buffer((T.int64(x.rotary_width // 2),), "float32")
        sines = T.alloc_buffer((T.int64(x.rotary_width // 2),), "float32")
        fill_angles(inv_freq, position, cosines, sines, x.rotary_width // 2)
    for g, h in T.grid(T.int64(x.groups), T.int64(x.lanes)):
        head: T.let = g * T.int64(x.lanes) + h
        if head < T.int64(x.heads):
            head_weights[g, h] = weights[i, j, head]
            for d in range(T.int64(x.width - x.rotary_width)):
                packed[g, x.place(d), h] = q[i, j, head, d]
            if x.rotary_width > 0:
                for d in range(T.int64(x.rotary_width // 2)):
                    at: T.let = T.int64(x.width - x.rotary_width) + T.int64(2) * d
                    even: T.let = q[i, j, head, at]
                    odd: T.let = q[i, j, head, at + T.int64(1)]
                    packed[g, x.place(at), h] = even * cosines[d] - odd * sines[d]
                    packed[g, x.place(at + T.int64(1)), h] = odd * cosines[d] + even * sines[d]
        else:  # fills the last vector and weighs nothing
            head_weights[g, h] = T.float32(0)
            for d in range(T.int64(x.width)):
                packed[g, d, h] = T.float32(0)


@T.inline
def choose_rows(
    x: Indexer,
    q: Any,
    weights: Any,
    index_rows: Any,
    positions: Any,
    lengths: Any,
    inv_freq: Any,
    out: Any,
    b: Any,
    s: Any,
) -> None:
    """``out[i, j]`` for every token: the best rows of each range of rows, then the best of those."""
    ranges: T.let = T.max(T.truncdiv(T.int64(x.schedule.items), b * s), T.int64(1))
    range_keys = T.alloc_buffer((b * s * ranges, T.int64(x.top_k)), "int64")
    range_counts = T.alloc_buffer((b * s * ranges,), "int64")
    with T.attr(0, "pragma_parallel_launch_point", 1):
        # Every n-th item to a thread: later tokens see more rows, and so cost more.
        with T.attr(0, "pragma_parallel_stride_pattern", 1):
            for item in T.parallel(b * s * ranges):
                token: T.let = T.truncdiv(item, ranges)
                part: T.let = T.truncmod(item, ranges)
                i: T.let = T.truncdiv(token, s)
                j: T.let = T.truncmod(token, s)
                # Variables, not lets: as lets they reach every index expression, and TVM's passes take seconds.
                ready: T.int64 = T.if_then_else(
                    j < lengths[i], (positions[i] + j + T.int64(1)) // T.int64(x.ratio), T.int64(0)
                )
                range_rows: T.int64 = T.max(
                    T.truncdiv(ready + ranges - T.int64(1), ranges), T.int64(x.schedule.range_rows)
                )
                begin: T.int64 = T.min(part * range_rows, ready)
                end: T.int64 = T.min(begin + range_rows, ready)
                keys = T.alloc_buffer((T.int64(buffer_size(x.top_k)),), "int64")
                count: T.int64 = T.int64(0)
                threshold: T.int64 = T.int64(LOWEST_KEY)
                if begin < end:
                    packed = T.alloc_buffer((x.groups, x.width, x.lanes), "float32")
                    head_weights = T.alloc_buffer((x.groups, x.lanes), "float32")
                    fresh = T.alloc_buffer((x.tile,), "int64")
                    lines = T.alloc_buffer((x.tile if x.stored.narrow else 1, x.width), "float32")
                    pack_queries(x, q, weights, inv_freq, packed, head_weights, i, j, positions[i] + j)
                    full: T.let = (end - begin) // T.int64(x.tile)
                    for step in range(full):
                        first: T.let = begin + step * T.int64(x.tile)
                        score_rows(
                            x.tile, x.vectors, x.groups, x.width, packed, head_weights, x.stored, index_rows, lines, i,
                            first, fresh,
                        )  # fmt: skip
                        for r in range(T.int64(x.tile)):
                            push(x.top_k, keys, count, threshold, fresh[r])
                    for rest in range((end - begin) % T.int64(x.tile)):
                        last: T.let = begin + full * T.int64(x.tile) + rest
                        score_rows(
                            1, x.vectors, x.groups, x.width, packed, head_weights, x.stored, index_rows, lines, i, last,
                            fresh,
                        )  # fmt: skip
                        push(x.top_k, keys, count, threshold, fresh[0])
                prune(x.top_k, keys, count, threshold)
                range_counts[item] = count
                for a in range(count):
                    range_keys[item, a] = keys[a]
    for token in T.parallel(b * s):
        merged = T.alloc_buffer((T.int64(buffer_size(x.top_k)),), "int64")
        total: T.int64 = T.int64(0)
        limit: T.int64 = T.int64(LOWEST_KEY)
        for part in range(ranges):
            for a in range(range_counts[token * ranges + part]):
                push(x.top_k, merged, total, limit, range_keys[token * ranges + part, a])
        prune(x.top_k, merged, total, limit)
        write_ranked(x.top_k, merged, total, out, T.truncdiv(token, s), T.truncmod(token, s))


def lightning_index(
    heads: int, width: int, ratio: int, top_k: int, rotary_width: int = 0, rows: str = "float32",
    schedule: IndexSchedule = DEFAULT,
) -> PrimFunc:  # fmt: skip
    """The `top_k` best finished rows per token by ``sum_h w_h * relu(q_h . k)`` (V4 paper, section 2.3).

    The paper's positive factor ``width**-0.5 * heads**-0.5`` is left out: it changes no order.

    Arguments of the PrimFunc: q ``[B, S, heads, width]``, weights ``[B, S, heads]``, index_rows ``[B, N, width]``
    float32, positions, lengths ``[B]`` int64, with a `rotary_width` inv_freq ``[rotary_width / 2]`` float32, out
    ``[B, S, top_k]`` int64. With a `rotary_width`, that many trailing dims of q are rotated by the token's position
    first. The token at position t sees rows ``w < (t + 1) // ratio``, of which there must be fewer than 2^32; only
    those are read. Rows are in descending order of score, ties to the smaller row, then -1; a padding token gets -1
    throughout. `rows` names the format of the index rows (`row_formats`), which says what stands in their last
    dimension.
    """
    x = Indexer(heads, width, ratio, top_k, rotary_width, cache_rows(width, rows), schedule)

    if rotary_width == 0:

        @T.prim_func(private=True, s_tir=True)
        def lightning_index(
            q_: T.handle,
            weights_: T.handle,
            index_rows_: T.handle,
            positions_: T.handle,
            lengths_: T.handle,
            out_: T.handle,
        ):
            T.func_attr({"tirx.noalias": True})
            b = T.int64()
            s = T.int64()
            n = T.int64()
            q = T.match_buffer(q_, (b, s, T.int64(heads), T.int64(width)), "float32")
            weights = T.match_buffer(weights_, (b, s, T.int64(heads)), "float32")
            index_rows = T.match_buffer(index_rows_, (b, n, T.int64(x.stored.columns)), x.stored.dtype)
            positions = T.match_buffer(positions_, (b,), "int64")
            lengths = T.match_buffer(lengths_, (b,), "int64")
            out = T.match_buffer(out_, (b, s, T.int64(top_k)), "int64")
            choose_rows(x, q, weights, index_rows, positions, lengths, None, out, b, s)

        return lightning_index

    @T.prim_func(private=True, s_tir=True)
    def rotary_lightning_index(
        q_: T.handle,
        weights_: T.handle,
        index_rows_: T.handle,
        positions_: T.handle,
        lengths_: T.handle,
        inv_freq_: T.handle,
        out_: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        b = T.int64()
        s = T.int64()
        n = T.int64()
        q = T.match_buffer(q_, (b, s, T.int64(heads), T.int64(width)), "float32")
        weights = T.match_buffer(weights_, (b, s, T.int64(heads)), "float32")
        index_rows = T.match_buffer(index_rows_, (b, n, T.int64(x.stored.columns)), x.stored.dtype)
        positions = T.match_buffer(positions_, (b,), "int64")
        lengths = T.match_buffer(lengths_, (b,), "int64")
        inv_freq = T.match_buffer(inv_freq_, (T.int64(rotary_width // 2),), "float32")
        out = T.match_buffer(out_, (b, s, T.int64(top_k)), "int64")
        choose_rows(x, q, weights, index_rows, positions, lengths, inv_freq, out, b, s)

    return rotary_lightning_index
