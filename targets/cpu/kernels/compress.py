"""KVCompress on the CPU: pool a finished window of tokens into one compressed row (CSA, HCA and the indexer).

Work items are the windows that this call completes, so a decode step that completes none does nothing but its ring
write. A softmax runs over the window's slots for every column apart, as two passes over strips of columns.
"""

# mypy: ignore-errors
# (TVMScript: names and loops below are parsed by TVM, not run by Python.)

from __future__ import annotations

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from .common import exp, sum_lanes, vector_width
from .rope import fill_angles

_LOWEST = -3.0e38  # start of a maximum: below every logit, and finite so that differences are


def kv_compress(width: int, row_width: int, rotary_width: int, ratio: int, eps: float) -> PrimFunc:
    """Pool, normalise and rotate the windows that become complete, then write the rings (V4 paper, section 2.3).

    With ``width == 2 * row_width`` windows overlap (CSA): row w takes the first half of window w - 1's columns and the
    second half of window w's, and the rings hold ``Q = 2 * ratio`` tokens; otherwise ``Q = ratio``.

    Arguments of the PrimFunc, all float32 but the last two: kv, gate ``[B, S, width]``, bias ``[ratio, width]``, norm
    ``[row_width]``, inv_freq ``[rotary_width / 2]``, state_kv, state_gate ``[B, Q, width]`` (in place; slot = position
    mod Q), rows ``[B, N, row_width]`` (in place), positions, lengths ``[B]`` int64. A row of the batch needs
    ``(position + length) // ratio <= N``.
    """
    ring = 2 * ratio if width == 2 * row_width else ratio
    own_columns = width - row_width  # where the columns of a window's own row begin
    half = rotary_width // 2
    kept = row_width - rotary_width
    lanes = vector_width(row_width)
    vectors = min(4, vector_width(row_width // lanes))
    strip = lanes * vectors

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
        inv_freq = T.match_buffer(inv_freq_, (T.int64(half),), "float32")
        state_kv = T.match_buffer(state_kv_, (b, T.int64(ring), T.int64(width)), "float32")
        state_gate = T.match_buffer(state_gate_, (b, T.int64(ring), T.int64(width)), "float32")
        rows = T.match_buffer(rows_, (b, n, T.int64(row_width)), "float32")
        positions = T.match_buffer(positions_, (b,), "int64")
        lengths = T.match_buffer(lengths_, (b,), "int64")

        # A chunk of S tokens completes at most ceil(S / ratio) windows.
        spans: T.let = (s + T.int64(ratio - 1)) // T.int64(ratio)
        for item in T.parallel(b * spans):
            i: T.let = T.truncdiv(item, spans)
            p: T.let = positions[i]
            w: T.let = p // T.int64(ratio) + T.truncmod(item, spans)
            first: T.let = (w + T.int64(1)) * T.int64(ratio) - T.int64(
                ring
            )  # of the slots' positions; < 0 at the start
            if w < (p + lengths[i]) // T.int64(ratio):
                peak = T.alloc_buffer((vectors, lanes), "float32", scope="local")
                total = T.alloc_buffer((vectors, lanes), "float32", scope="local")
                pooled = T.alloc_buffer((vectors, lanes), "float32", scope="local")
                squares = T.alloc_buffer((1, lanes), "float32", scope="local")
                cosines = T.alloc_buffer((T.int64(half),), "float32")
                sines = T.alloc_buffer((T.int64(half),), "float32")
                begin: T.let = T.max(T.int64(0) - first, T.int64(0))
                for v in T.vectorized(lanes):
                    squares[0, v] = T.float32(0)
                for block in range(T.int64(row_width // strip)):
                    for u in T.unroll(vectors):
                        for v in T.vectorized(lanes):
                            peak[u, v] = T.float32(_LOWEST)
                            total[u, v] = T.float32(0)
                            pooled[u, v] = T.float32(0)
                    for slot in range(T.int64(ring) - begin):
                        k: T.let = slot + begin
                        t: T.let = first + k
                        column: T.let = block * T.int64(strip) + T.if_then_else(
                            k >= T.int64(ring - ratio), T.int64(own_columns), T.int64(0)
                        )
                        for u in T.unroll(vectors):
                            for v in T.vectorized(lanes):
                                peak[u, v] = T.max(
                                    peak[u, v],
                                    T.if_then_else(
                                        t >= p,
                                        gate[i, T.max(t - p, T.int64(0)), column + u * lanes + v],
                                        state_gate[i, t % T.int64(ring), column + u * lanes + v],
                                    )
                                    + bias[k % T.int64(ratio), column + u * lanes + v],
                                )
                    for slot in range(T.int64(ring) - begin):
                        k: T.let = slot + begin
                        t: T.let = first + k
                        column: T.let = block * T.int64(strip) + T.if_then_else(
                            k >= T.int64(ring - ratio), T.int64(own_columns), T.int64(0)
                        )
                        weight = T.alloc_buffer((vectors, lanes), "float32", scope="local")
                        for u in T.unroll(vectors):
                            for v in T.vectorized(lanes):
                                weight[u, v] = (
                                    T.if_then_else(
                                        t >= p,
                                        gate[i, T.max(t - p, T.int64(0)), column + u * lanes + v],
                                        state_gate[i, t % T.int64(ring), column + u * lanes + v],
                                    )
                                    + bias[k % T.int64(ratio), column + u * lanes + v]
                                    - peak[u, v]
                                )
                            for v in T.vectorized(lanes):
                                weight[u, v] = exp(weight[u, v])
                            for v in T.vectorized(lanes):
                                total[u, v] = total[u, v] + weight[u, v]
                                pooled[u, v] = pooled[u, v] + weight[u, v] * T.if_then_else(
                                    t >= p,
                                    kv[i, T.max(t - p, T.int64(0)), column + u * lanes + v],
                                    state_kv[i, t % T.int64(ring), column + u * lanes + v],
                                )
                    for u in T.unroll(vectors):
                        for v in T.vectorized(lanes):
                            pooled[u, v] = pooled[u, v] / total[u, v]
                        for v in T.vectorized(lanes):
                            squares[0, v] = squares[0, v] + pooled[u, v] * pooled[u, v]
                            rows[i, w, block * T.int64(strip) + u * lanes + v] = pooled[u, v]
                sum_lanes(squares, 0, lanes)
                inverse: T.let = T.float32(1) / T.sqrt(squares[0, 0] / T.float32(row_width) + T.float32(eps))
                for d in range(T.int64(row_width)):
                    rows[i, w, d] = rows[i, w, d] * inverse * norm[d]
                fill_angles(inv_freq, w * T.int64(ratio), cosines, sines, half)
                for d in range(T.int64(half)):
                    even: T.let = rows[i, w, T.int64(kept) + T.int64(2) * d]
                    odd: T.let = rows[i, w, T.int64(kept) + T.int64(2) * d + T.int64(1)]
                    rows[i, w, T.int64(kept) + T.int64(2) * d] = even * cosines[d] - odd * sines[d]
                    rows[i, w, T.int64(kept) + T.int64(2) * d + T.int64(1)] = odd * cosines[d] + even * sines[d]

        # The rings last: every read of the old tokens lies above.
        for i in range(b):
            live: T.let = T.min(lengths[i], T.int64(ring))
            for a in range(live):
                j: T.let = lengths[i] - live + a
                for d in range(T.int64(width)):
                    state_kv[i, (positions[i] + j) % T.int64(ring), d] = kv[i, j, d]
                for d in range(T.int64(width)):
                    state_gate[i, (positions[i] + j) % T.int64(ring), d] = gate[i, j, d]

    return kv_compress
