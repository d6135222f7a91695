"""KVCompress on the CPU: pool a finished window of tokens into one compressed row (CSA, HCA and the indexer).

Work items are the windows that this call completes; a decode step that completes none starts no threads and only writes
its rings. A softmax runs over the window's slots for every column apart, as two passes over strips of columns. Two
compressors of the same tokens (CSA's and its indexer's) share one launch in `kv_compress_pair`.
"""

# mypy: ignore-errors
# (TVMScript: names and loops below are parsed by TVM, not run by Python.)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from .common import exp, sum_lanes, vector_width
from .rope import fill_angles
from .row_formats import CacheRows, cache_rows

_LOWEST = -3.0e38  # start of a maximum: below every logit, and finite so that differences are


@dataclass(frozen=True)
class Compressor:
    """The sizes of one compressor, and how its columns are cut into strips of vectors."""

    width: int
    row_width: int
    rotary_width: int
    ratio: int
    eps: float
    stored: CacheRows
    """Format of the compressed rows."""

    @property
    def ring(self) -> int:
        """Tokens that a row is made from: two windows where they overlap, else one."""
        return 2 * self.ratio if self.width == 2 * self.row_width else self.ratio

    @property
    def own_columns(self) -> int:
        """Where the columns of a window's own row begin; the ones before it are for the row of the next window."""
        return self.width - self.row_width

    @property
    def half(self) -> int:
        return self.rotary_width // 2

    @property
    def kept(self) -> int:
        return self.row_width - self.rotary_width

    @property
    def lanes(self) -> int:
        return vector_width(self.row_width)

    @property
    def vectors(self) -> int:
        return min(4, vector_width(self.row_width // self.lanes))

    @property
    def strip(self) -> int:
        return self.lanes * self.vectors


@T.inline
def count_windows(ratio: int, positions: Any, lengths: Any, b: Any, most: Any) -> None:
    """Raise `most` to the number of windows that this call completes in the row of the batch with most of them."""
    for i in range(b):
        most = T.max(most, (positions[i] + lengths[i]) // T.int64(ratio) - positions[i] // T.int64(ratio))


@T.inline
def compress_window(
    c: Compressor,
    kv: Any,
    gate: Any,
    bias: Any,
    norm: Any,
    inv_freq: Any,
    state_kv: Any,
    state_gate: Any,
    rows: Any,
    i: Any,
    p: Any,
    w: Any,
) -> None:
    """``rows[i, w]``: window `w` of row `i`, whose first token of this call is at position `p`, pooled and rotated."""
    # Of the slots' positions; below 0 at the start.
    first: T.let = (w + T.int64(1)) * T.int64(c.ratio) - T.int64(c.ring)
    # In the default scope: such small buffers become registers, while scope "local" costs a call of TVM's runtime each.
    peak = T.alloc_buffer((c.vectors, c.lanes), "float32")
    total = T.alloc_buffer((c.vectors, c.lanes), "float32")
    pooled = T.alloc_buffer((c.vectors, c.lanes), "float32")
    squares = T.alloc_buffer((1, c.lanes), "float32")
    row = T.alloc_buffer((T.int64(1), T.int64(c.row_width)), "float32")
    cosines = T.alloc_buffer((T.int64(c.half),), "float32")
    sines = T.alloc_buffer((T.int64(c.half),), "float32")
    begin: T.let = T.max(T.int64(0) - first, T.int64(0))
    for v in T.vectorized(c.lanes):
        squares[0, v] = T.float32(0)
    for block in range(T.int64(c.row_width // c.strip)):
        for u in T.unroll(c.vectors):
            for v in T.vectorized(c.lanes):
                peak[u, v] = T.float32(_LOWEST)
                total[u, v] = T.float32(0)
                pooled[u, v] = T.float32(0)
        for slot in range(T.int64(c.ring) - begin):
            k: T.let = slot + begin
            t: T.let = first + k
            column: T.let = block * T.int64(c.strip) + T.if_then_else(
                k >= T.int64(c.ring - c.ratio), T.int64(c.own_columns), T.int64(0)
            )
            for u in T.unroll(c.vectors):
                for v in T.vectorized(c.lanes):
                    peak[u, v] = T.max(
                        peak[u, v],
                        T.if_then_else(
                            t >= p,
                            gate[i, T.max(t - p, T.int64(0)), column + u * c.lanes + v],
                            state_gate[i, t % T.int64(c.ring), column + u * c.lanes + v],
                        )
                        + bias[k % T.int64(c.ratio), column + u * c.lanes + v],
                    )
        for slot in range(T.int64(c.ring) - begin):
            k: T.let = slot + begin
            t: T.let = first + k
            column: T.let = block * T.int64(c.strip) + T.if_then_else(
                k >= T.int64(c.ring - c.ratio), T.int64(c.own_columns), T.int64(0)
            )
            weight = T.alloc_buffer((c.vectors, c.lanes), "float32")
            for u in T.unroll(c.vectors):
                for v in T.vectorized(c.lanes):
                    weight[u, v] = (
                        T.if_then_else(
                            t >= p,
                            gate[i, T.max(t - p, T.int64(0)), column + u * c.lanes + v],
                            state_gate[i, t % T.int64(c.ring), column + u * c.lanes + v],
                        )
                        + bias[k % T.int64(c.ratio), column + u * c.lanes + v]
                        - peak[u, v]
                    )
                for v in T.vectorized(c.lanes):
                    weight[u, v] = exp(weight[u, v])
                for v in T.vectorized(c.lanes):
                    total[u, v] = total[u, v] + weight[u, v]
                    pooled[u, v] = pooled[u, v] + weight[u, v] * T.if_then_else(
                        t >= p,
                        kv[i, T.max(t - p, T.int64(0)), column + u * c.lanes + v],
                        state_kv[i, t % T.int64(c.ring), column + u * c.lanes + v],
                    )
        for u in T.unroll(c.vectors):
            for v in T.vectorized(c.lanes):
                pooled[u, v] = pooled[u, v] / total[u, v]
            for v in T.vectorized(c.lanes):
                squares[0, v] = squares[0, v] + pooled[u, v] * pooled[u, v]
                row[0, block * T.int64(c.strip) + u * c.lanes + v] = pooled[u, v]
    sum_lanes(squares, 0, c.lanes)
    inverse: T.let = T.float32(1) / T.sqrt(squares[0, 0] / T.float32(c.row_width) + T.float32(c.eps))
    for d in range(T.int64(c.row_width)):
        row[0, d] = row[0, d] * inverse * norm[d]
    fill_angles(inv_freq, w * T.int64(c.ratio), cosines, sines, c.half)
    for d in range(T.int64(c.half)):
        even: T.let = row[0, T.int64(c.kept) + T.int64(2) * d]
        odd: T.let = row[0, T.int64(c.kept) + T.int64(2) * d + T.int64(1)]
        row[0, T.int64(c.kept) + T.int64(2) * d] = even * cosines[d] - odd * sines[d]
        row[0, T.int64(c.kept) + T.int64(2) * d + T.int64(1)] = odd * cosines[d] + even * sines[d]
    c.stored.write(rows, i, w, row, T.int64(0))


@T.inline
def write_rings(
    c: Compressor, kv: Any, gate: Any, state_kv: Any, state_gate: Any, positions: Any, lengths: Any, b: Any
) -> None:
    """The last live tokens into the rings, after every read of the old ones."""
    for i in range(b):
        live: T.let = T.min(lengths[i], T.int64(c.ring))
        for a in range(live):
            j: T.let = lengths[i] - live + a
            for d in range(T.int64(c.width)):
                state_kv[i, (positions[i] + j) % T.int64(c.ring), d] = kv[i, j, d]
            for d in range(T.int64(c.width)):
                state_gate[i, (positions[i] + j) % T.int64(c.ring), d] = gate[i, j, d]


def kv_compress(
    width: int, row_width: int, rotary_width: int, ratio: int, eps: float, rows: str = "float32"
) -> PrimFunc:
    """Pool, normalise and rotate the windows that become complete, then write the rings (V4 paper, section 2.3).

    With ``width == 2 * row_width`` windows overlap (CSA): row w takes the first half of window w - 1's columns and the
    second half of window w's, and the rings hold ``Q = 2 * ratio`` tokens; otherwise ``Q = ratio``.

    Arguments of the PrimFunc, all float32 but the last two: kv, gate ``[B, S, width]``, bias ``[ratio, width]``, norm
    ``[row_width]``, inv_freq ``[rotary_width / 2]``, state_kv, state_gate ``[B, Q, width]`` (in place; slot = position
    mod Q), rows ``[B, N, row_width]`` (in place), positions, lengths ``[B]`` int64. A row of the batch needs
    ``(position + length) // ratio <= N``. `rows` names the format of the rows (`row_formats`), which says what stands
    in their last dimension.
    """
    c = Compressor(width, row_width, rotary_width, ratio, eps, cache_rows(row_width, rows))

    @T.prim_func(private=True, s_tir=True)
    def kv_compress(
        kv_: T.handle,
        gate_: T.handle,
        bias_: T.handle,
        norm_: T.handle,
        inv_freq_: T.handle,
        state_kv_: T.handle,
        state_gate_: T.handle,
        rows_: T.handle,
        positions_: T.handle,
        lengths_: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        b = T.int64()
        s = T.int64()
        n = T.int64()
        kv = T.match_buffer(kv_, (b, s, T.int64(width)), "float32")
        gate = T.match_buffer(gate_, (b, s, T.int64(width)), "float32")
        bias = T.match_buffer(bias_, (T.int64(ratio), T.int64(width)), "float32")
        norm = T.match_buffer(norm_, (T.int64(row_width),), "float32")
        inv_freq = T.match_buffer(inv_freq_, (T.int64(c.half),), "float32")
        state_kv = T.match_buffer(state_kv_, (b, T.int64(c.ring), T.int64(width)), "float32")
        state_gate = T.match_buffer(state_gate_, (b, T.int64(c.ring), T.int64(width)), "float32")
        rows = T.match_buffer(rows_, (b, n, T.int64(c.stored.columns)), c.stored.dtype)
        positions = T.match_buffer(positions_, (b,), "int64")
        lengths = T.match_buffer(lengths_, (b,), "int64")

        most: T.int64 = T.int64(0)
        count_windows(ratio, positions, lengths, b, most)
        spans: T.let = most
        if spans > T.int64(0):
            for item in T.parallel(b * spans):
                i: T.let = T.truncdiv(item, spans)
                p: T.let = positions[i]
                w: T.let = p // T.int64(ratio) + T.truncmod(item, spans)
                if w < (p + lengths[i]) // T.int64(ratio):
                    compress_window(c, kv, gate, bias, norm, inv_freq, state_kv, state_gate, rows, i, p, w)
        write_rings(c, kv, gate, state_kv, state_gate, positions, lengths, b)

    return kv_compress


def kv_compress_pair(
    width: int, row_width: int, index_width: int, index_row_width: int, rotary_width: int, ratio: int, eps: float,
    rows: str = "float32", index_rows: str = "float32",
) -> PrimFunc:  # fmt: skip
    """Two compressors of the same tokens in one launch: CSA's and its indexer's (V4 paper, section 2.3).

    Arguments of the PrimFunc, all float32 but the last two, shapes as in `kv_compress`: kv, gate, bias, norm, state_kv,
    state_gate (in place), rows (in place); the same seven of the indexer, of ``index_width`` and ``index_row_width``
    and with an N of its own; inv_freq ``[rotary_width / 2]``, positions, lengths ``[B]`` int64. `rows` and `index_rows`
    name the formats of the rows (`row_formats`).
    """
    c = Compressor(width, row_width, rotary_width, ratio, eps, cache_rows(row_width, rows))
    x = Compressor(index_width, index_row_width, rotary_width, ratio, eps, cache_rows(index_row_width, index_rows))

    @T.prim_func(private=True, s_tir=True)
    def kv_compress_pair(
        kv_: T.handle,
        gate_: T.handle,
        bias_: T.handle,
        norm_: T.handle,
        state_kv_: T.handle,
        state_gate_: T.handle,
        rows_: T.handle,
        index_kv_: T.handle,
        index_gate_: T.handle,
        index_bias_: T.handle,
        index_norm_: T.handle,
        index_state_kv_: T.handle,
        index_state_gate_: T.handle,
        index_rows_: T.handle,
        inv_freq_: T.handle,
        positions_: T.handle,
        lengths_: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        b = T.int64()
        s = T.int64()
        n = T.int64()
        index_n = T.int64()
        kv = T.match_buffer(kv_, (b, s, T.int64(width)), "float32")
        gate = T.match_buffer(gate_, (b, s, T.int64(width)), "float32")
        bias = T.match_buffer(bias_, (T.int64(ratio), T.int64(width)), "float32")
        norm = T.match_buffer(norm_, (T.int64(row_width),), "float32")
        state_kv = T.match_buffer(state_kv_, (b, T.int64(c.ring), T.int64(width)), "float32")
        state_gate = T.match_buffer(state_gate_, (b, T.int64(c.ring), T.int64(width)), "float32")
        rows = T.match_buffer(rows_, (b, n, T.int64(c.stored.columns)), c.stored.dtype)
        index_kv = T.match_buffer(index_kv_, (b, s, T.int64(index_width)), "float32")
        index_gate = T.match_buffer(index_gate_, (b, s, T.int64(index_width)), "float32")
        index_bias = T.match_buffer(index_bias_, (T.int64(ratio), T.int64(index_width)), "float32")
        index_norm = T.match_buffer(index_norm_, (T.int64(index_row_width),), "float32")
        index_state_kv = T.match_buffer(index_state_kv_, (b, T.int64(x.ring), T.int64(index_width)), "float32")
        index_state_gate = T.match_buffer(index_state_gate_, (b, T.int64(x.ring), T.int64(index_width)), "float32")
        index_rows = T.match_buffer(index_rows_, (b, index_n, T.int64(x.stored.columns)), x.stored.dtype)
        inv_freq = T.match_buffer(inv_freq_, (T.int64(c.half),), "float32")
        positions = T.match_buffer(positions_, (b,), "int64")
        lengths = T.match_buffer(lengths_, (b,), "int64")

        most: T.int64 = T.int64(0)
        count_windows(ratio, positions, lengths, b, most)
        spans: T.let = most
        if spans > T.int64(0):
            # The two in turn, so that threads, which take consecutive items, get as much of the one as of the other.
            for item in T.parallel(T.int64(2) * b * spans):
                i: T.let = T.truncdiv(item, T.int64(2) * spans)
                p: T.let = positions[i]
                w: T.let = p // T.int64(ratio) + T.truncmod(item, T.int64(2) * spans) // T.int64(2)
                if w < (p + lengths[i]) // T.int64(ratio):
                    if item % T.int64(2) == T.int64(0):
                        compress_window(c, kv, gate, bias, norm, inv_freq, state_kv, state_gate, rows, i, p, w)
                    else:
                        compress_window(
                            x, index_kv, index_gate, index_bias, index_norm, inv_freq, index_state_kv,
                            index_state_gate, index_rows, i, p, w,
                        )  # fmt: skip
        write_rings(c, kv, gate, state_kv, state_gate, positions, lengths, b)
        write_rings(x, index_kv, index_gate, index_state_kv, index_state_gate, positions, lengths, b)

    return kv_compress_pair
