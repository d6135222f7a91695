"""The Engram kernels of the CPU: hash the last tokens into table addresses, fetch the rows, gate and convolve them.

The hash is exact int64 arithmetic with wraparound. The gate needs one number per (token, stream); from it the
convolution recomputes its inputs out of the shared value row, so no activation of the chunk is stored.
"""

# mypy: ignore-errors
# (TVMScript: names and loops below are parsed by TVM, not run by Python.)

from __future__ import annotations

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from .common import silu, sum_lanes, vector_width

_GATE_FLOOR = 1e-6  # of |x| under the gate's signed square root


def engram_hash(max_ngram: int, addresses: int, pad_id: int) -> PrimFunc:
    """Table addresses of every token's n-grams, n = 2 .. `max_ngram` (Engram paper, section 2.2).

    Arguments of the PrimFunc, int64: input_ids ``[B, S]``, lookup ``[V]``, multipliers ``[max_ngram]``, primes,
    offsets ``[addresses]``, history ``[B, max_ngram - 1]`` (in place; slot = position mod ``max_ngram - 1``),
    positions, lengths ``[B]``, out ``[B, S, addresses]``. Addresses are ordered by n, then by head. A padding token's
    ids are not read; its addresses are the offsets, which lie in the table.
    """
    ring = max_ngram - 1
    heads = addresses // ring

    @T.prim_func(private=True, s_tir=True)
    def engram_hash(
        input_ids_: T.handle,
        lookup_: T.handle,
        multipliers_: T.handle,
        primes_: T.handle,
        offsets_: T.handle,
        history_: T.handle,
        positions_: T.handle,
        lengths_: T.handle,
        out_: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        b = T.int64()
        s = T.int64()
        vocab = T.int64()
        input_ids = T.match_buffer(input_ids_, (b, s), "int64")
        lookup = T.match_buffer(lookup_, (vocab,), "int64")
        multipliers = T.match_buffer(multipliers_, (T.int64(max_ngram),), "int64")
        primes = T.match_buffer(primes_, (T.int64(addresses),), "int64")
        offsets = T.match_buffer(offsets_, (T.int64(addresses),), "int64")
        history = T.match_buffer(history_, (b, T.int64(ring)), "int64")
        positions = T.match_buffer(positions_, (b,), "int64")
        lengths = T.match_buffer(lengths_, (b,), "int64")
        out = T.match_buffer(out_, (b, s, T.int64(addresses)), "int64")
        for i in range(b):
            for j in range(s):
                if j < lengths[i]:
                    mixed: T.int64 = lookup[input_ids[i, j]] * multipliers[0]
                    for back in range(T.int64(ring)):
                        t: T.let = positions[i] + j - T.int64(1) - back
                        earlier: T.int64 = T.int64(0)
                        if t < T.int64(0):
                            earlier = lookup[T.int64(pad_id)]
                        elif j > back:
                            earlier = lookup[input_ids[i, j - T.int64(1) - back]]
                        else:
                            earlier = history[i, t % T.int64(ring)]
                        mixed = T.bitwise_xor(mixed, earlier * multipliers[back + T.int64(1)])
                        for h in range(T.int64(heads)):
                            a: T.let = back * T.int64(heads) + h
                            out[i, j, a] = T.floormod(mixed, primes[a]) + offsets[a]
                else:
                    for a in range(T.int64(addresses)):
                        out[i, j, a] = offsets[a]
        for i in range(b):
            live: T.let = T.min(lengths[i], T.int64(ring))
            for a in range(live):
                j: T.let = lengths[i] - live + a
                history[i, (positions[i] + j) % T.int64(ring)] = lookup[input_ids[i, j]]

    return engram_hash


def engram_lookup(addresses: int, width: int, table_dtype: str = "float32") -> PrimFunc:
    """Rows of the embedding table, side by side (Engram paper, section 2.2).

    Arguments of the PrimFunc: table ``[R, width]`` of `table_dtype` (float32 or bfloat16), addresses
    ``[B, S, addresses]`` int64, out ``[B, S, addresses * width]`` float32.
    """

    @T.prim_func(private=True, s_tir=True)
    def engram_lookup(table_: T.handle, addresses_: T.handle, out_: T.handle):
        T.func_attr({"tirx.noalias": True})
        b = T.int64()
        s = T.int64()
        n = T.int64()
        table = T.match_buffer(table_, (n, T.int64(width)), table_dtype)
        rows = T.match_buffer(addresses_, (b, s, T.int64(addresses)), "int64")
        out = T.match_buffer(out_, (b, s, T.int64(addresses * width)), "float32")
        for item in T.parallel(b * s):
            i: T.let = T.truncdiv(item, s)
            j: T.let = T.truncmod(item, s)
            for a in range(T.int64(addresses)):
                for d in range(T.int64(width)):
                    out[i, j, a * T.int64(width) + d] = T.cast(table[rows[i, j, a], d], "float32")

    return engram_lookup


def engram_gate_conv(streams: int, width: int, kernel: int, dilation: int, eps: float) -> PrimFunc:
    """Gate the value per stream, convolve it, add both to the streams (Engram paper, sections 2.3 and 2.4).

    Arguments of the PrimFunc, float32 unless noted, M = `streams`, D = `width`, Q = ``(kernel - 1) * dilation``:
    keys ``[B, S, M, D]``, value ``[B, S, D]``, streams ``[B, S, M, D]``, key_norm, stream_norm, conv_norm ``[M, D]``,
    conv_weight ``[M * D, kernel]``, conv_state ``[B, Q, M * D]`` (in place; slot = position mod Q), positions,
    lengths ``[B]`` int64, out ``[B, S, M, D]``. Tap k of the convolution reads ``(kernel - 1 - k) * dilation`` tokens
    back, zero before position 0.
    """
    ring = (kernel - 1) * dilation
    lanes = vector_width(width)
    vectors = min(4, vector_width(width // lanes))
    strip = lanes * vectors
    strips = width // strip

    @T.prim_func(private=True, s_tir=True)
    def engram_gate_conv(
        keys_: T.handle,
        value_: T.handle,
        hidden_: T.handle,
        key_norm_: T.handle,
        stream_norm_: T.handle,
        conv_norm_: T.handle,
        conv_weight_: T.handle,
        conv_state_: T.handle,
        positions_: T.handle,
        lengths_: T.handle,
        out_: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        b = T.int64()
        s = T.int64()
        keys = T.match_buffer(keys_, (b, s, T.int64(streams), T.int64(width)), "float32")
        value = T.match_buffer(value_, (b, s, T.int64(width)), "float32")
        hidden = T.match_buffer(hidden_, (b, s, T.int64(streams), T.int64(width)), "float32")
        key_norm = T.match_buffer(key_norm_, (T.int64(streams), T.int64(width)), "float32")
        stream_norm = T.match_buffer(stream_norm_, (T.int64(streams), T.int64(width)), "float32")
        conv_norm = T.match_buffer(conv_norm_, (T.int64(streams), T.int64(width)), "float32")
        conv_weight = T.match_buffer(conv_weight_, (T.int64(streams * width), T.int64(kernel)), "float32")
        conv_state = T.match_buffer(conv_state_, (b, T.int64(ring), T.int64(streams * width)), "float32")
        positions = T.match_buffer(positions_, (b,), "int64")
        lengths = T.match_buffer(lengths_, (b,), "int64")
        out = T.match_buffer(out_, (b, s, T.int64(streams), T.int64(width)), "float32")

        # Per token and stream: the gate, and gate / rms(gate * value), which makes a convolution input of a value.
        gates = T.alloc_buffer((b, s, T.int64(streams)), "float32")
        factors = T.alloc_buffer((b, s, T.int64(streams)), "float32")
        for item in T.parallel(b * s * T.int64(streams)):
            i: T.let = T.truncdiv(item // T.int64(streams), s)
            j: T.let = T.truncmod(item // T.int64(streams), s)
            m: T.let = item % T.int64(streams)
            sums = T.alloc_buffer((4, lanes), "float32", scope="local")
            for x in T.unroll(4):
                for v in T.vectorized(lanes):
                    sums[x, v] = T.float32(0)
            for block in range(T.int64(width // lanes)):
                d: T.let = block * T.int64(lanes)
                for v in T.vectorized(lanes):
                    sums[0, v] = sums[0, v] + keys[i, j, m, d + v] * keys[i, j, m, d + v]
                for v in T.vectorized(lanes):
                    sums[1, v] = sums[1, v] + hidden[i, j, m, d + v] * hidden[i, j, m, d + v]
                for v in T.vectorized(lanes):
                    sums[2, v] = sums[2, v] + value[i, j, d + v] * value[i, j, d + v]
                for v in T.vectorized(lanes):
                    sums[3, v] = sums[3, v] + (keys[i, j, m, d + v] * key_norm[m, d + v]) * (
                        hidden[i, j, m, d + v] * stream_norm[m, d + v]
                    )
            for x in T.unroll(4):
                sum_lanes(sums, x, lanes)
            key_scale: T.let = sums[0, 0] / T.float32(width) + T.float32(eps)
            hidden_scale: T.let = sums[1, 0] / T.float32(width) + T.float32(eps)
            dot: T.let = sums[3, 0] / (T.sqrt(key_scale) * T.sqrt(hidden_scale) * T.float32(width**0.5))
            root: T.let = T.sqrt(T.max(T.abs(dot), T.float32(_GATE_FLOOR)))
            # sign(0) is 0: a dot product of exactly zero gates by one half.
            signed: T.let = T.if_then_else(
                dot > T.float32(0), root, T.if_then_else(dot < T.float32(0), T.float32(0) - root, T.float32(0))
            )
            gate: T.let = T.float32(1) / (T.float32(1) + T.exp(T.float32(0) - signed))
            mean: T.let = sums[2, 0] / T.float32(width)
            gates[i, j, m] = gate
            factors[i, j, m] = gate / T.sqrt(gate * gate * mean + T.float32(eps))

        # The convolution goes down the tokens with one strip of columns, its weights held in registers.
        for item in T.parallel(b * T.int64(streams * strips)):
            i: T.let = item // T.int64(streams * strips)
            m: T.let = item // T.int64(strips) % T.int64(streams)
            d: T.let = item % T.int64(strips) * T.int64(strip)
            taps = T.alloc_buffer((kernel, vectors, lanes), "float32", scope="local")
            gains = T.alloc_buffer((vectors, lanes), "float32", scope="local")
            acc = T.alloc_buffer((vectors, lanes), "float32", scope="local")
            for u in T.unroll(vectors):
                for v in T.vectorized(lanes):
                    gains[u, v] = conv_norm[m, d + u * lanes + v]
                for k in T.unroll(kernel):
                    for v in T.vectorized(lanes):
                        taps[k, u, v] = conv_weight[m * T.int64(width) + d + u * lanes + v, k]
            for j in range(s):
                for u in T.unroll(vectors):
                    for v in T.vectorized(lanes):
                        acc[u, v] = T.float32(0)
                for k in T.unroll(kernel):
                    back: T.let = T.int64(kernel - 1 - k) * T.int64(dilation)
                    t: T.let = positions[i] + j - back
                    if j >= back:
                        for u in T.unroll(vectors):
                            for v in T.vectorized(lanes):
                                acc[u, v] = acc[u, v] + taps[k, u, v] * (
                                    value[i, j - back, d + u * lanes + v] * factors[i, j - back, m] * gains[u, v]
                                )
                    elif t >= T.int64(0):
                        for u in T.unroll(vectors):
                            for v in T.vectorized(lanes):
                                acc[u, v] = (
                                    acc[u, v]
                                    + taps[k, u, v]
                                    * conv_state[i, t % T.int64(ring), m * T.int64(width) + d + u * lanes + v]
                                )
                for u in T.unroll(vectors):
                    for v in T.vectorized(lanes):
                        out[i, j, m, d + u * lanes + v] = (
                            hidden[i, j, m, d + u * lanes + v]
                            + gates[i, j, m] * value[i, j, d + u * lanes + v]
                            + silu(acc[u, v])
                        )

        for i in range(b):
            live: T.let = T.min(lengths[i], T.int64(ring))
            for a in range(live):
                j: T.let = lengths[i] - live + a
                for m in range(T.int64(streams)):
                    for d in range(T.int64(width)):
                        conv_state[i, (positions[i] + j) % T.int64(ring), m * T.int64(width) + d] = (
                            value[i, j, d] * factors[i, j, m] * conv_norm[m, d]
                        )

    return engram_gate_conv
