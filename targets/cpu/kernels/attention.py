"""The three attention kernels of the CPU: sliding window, compressed sparse (CSA) and heavily compressed (HCA).

They differ only in which compressed rows follow the raw ones. A work item is a token, or, where tokens are too few to
feed the threads, one block of its heads. The window rings are written last, in a loop of their own.
"""

# mypy: ignore-errors
# (TVMScript: names and loops below are parsed by TVM, not run by Python.)

from __future__ import annotations

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from .attention_steps import attend_token, parts, tiles, write_window, zero


def sliding_window_attention(heads: int, width: int, window_size: int, scale: float) -> PrimFunc:
    """Attention over the last `window_size` raw rows, the token's own included (V4 paper, section 2.3).

    Arguments of the PrimFunc, float32 unless noted: q ``[B, S, heads, width]``, kv ``[B, S, width]``, window
    ``[B, window_size, width]`` (in place), sinks ``[heads]``, positions, lengths ``[B]`` int64, out as q. Outputs of
    padding tokens are zero.
    """
    tile = tiles(heads, width)

    @T.prim_func(private=True, s_tir=True)
    def sliding_window_attention(
        q_: T.handle,
        kv_: T.handle,
        window_: T.handle,
        sinks_: T.handle,
        positions_: T.handle,
        lengths_: T.handle,
        out_: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        b = T.int64()
        s = T.int64()
        q = T.match_buffer(q_, (b, s, T.int64(heads), T.int64(width)), "float32")
        kv = T.match_buffer(kv_, (b, s, T.int64(width)), "float32")
        window = T.match_buffer(window_, (b, T.int64(window_size), T.int64(width)), "float32")
        sinks = T.match_buffer(sinks_, (T.int64(heads),), "float32")
        positions = T.match_buffer(positions_, (b,), "int64")
        lengths = T.match_buffer(lengths_, (b,), "int64")
        out = T.match_buffer(out_, (b, s, T.int64(heads), T.int64(width)), "float32")
        split: T.let = parts(tile, b * s)
        blocks: T.let = T.truncdiv(T.int64(tile.blocks), split)
        with T.attr(0, "pragma_parallel_launch_point", 1):
            # Every n-th item to a thread: later tokens see more rows, and so cost more.
            with T.attr(0, "pragma_parallel_stride_pattern", 1):
                for item in T.parallel(split * b * s):
                    i: T.let = T.truncdiv(T.truncmod(item, b * s), s)
                    j: T.let = T.truncmod(item, s)
                    first_head: T.let = T.truncdiv(item, b * s) * blocks * T.int64(tile.head_block)
                    if j < lengths[i]:
                        attend_token(
                            tile, window_size, scale, q, kv, window, None, None, T.int64(0), sinks,
                            positions[i], out, i, j, first_head, blocks,
                        )  # fmt: skip
                    else:
                        zero(tile, out, i, j, first_head, blocks)
        write_window(tile, window_size, kv, window, positions, lengths, b)

    return sliding_window_attention


def heavily_compressed_attention(heads: int, width: int, window_size: int, ratio: int, scale: float) -> PrimFunc:
    """Attention over the raw window and every finished compressed row (HCA; V4 paper, section 2.3).

    Arguments of the PrimFunc, float32 unless noted: q ``[B, S, heads, width]``, kv ``[B, S, width]``, window
    ``[B, window_size, width]`` (in place), rows ``[B, N, width]``, sinks ``[heads]``, positions, lengths ``[B]``
    int64, out as q. The token at position t sees rows ``w < (t + 1) // ratio``. Outputs of padding tokens are zero.
    """
    tile = tiles(heads, width)

    @T.prim_func(private=True, s_tir=True)
    def heavily_compressed_attention(
        q_: T.handle,
        kv_: T.handle,
        window_: T.handle,
        rows_: T.handle,
        sinks_: T.handle,
        positions_: T.handle,
        lengths_: T.handle,
        out_: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        b = T.int64()
        s = T.int64()
        n = T.int64()
        q = T.match_buffer(q_, (b, s, T.int64(heads), T.int64(width)), "float32")
        kv = T.match_buffer(kv_, (b, s, T.int64(width)), "float32")
        window = T.match_buffer(window_, (b, T.int64(window_size), T.int64(width)), "float32")
        rows = T.match_buffer(rows_, (b, n, T.int64(width)), "float32")
        sinks = T.match_buffer(sinks_, (T.int64(heads),), "float32")
        positions = T.match_buffer(positions_, (b,), "int64")
        lengths = T.match_buffer(lengths_, (b,), "int64")
        out = T.match_buffer(out_, (b, s, T.int64(heads), T.int64(width)), "float32")
        split: T.let = parts(tile, b * s)
        blocks: T.let = T.truncdiv(T.int64(tile.blocks), split)
        with T.attr(0, "pragma_parallel_launch_point", 1):
            # Every n-th item to a thread: later tokens see more rows, and so cost more.
            with T.attr(0, "pragma_parallel_stride_pattern", 1):
                for item in T.parallel(split * b * s):
                    i: T.let = T.truncdiv(T.truncmod(item, b * s), s)
                    j: T.let = T.truncmod(item, s)
                    first_head: T.let = T.truncdiv(item, b * s) * blocks * T.int64(tile.head_block)
                    if j < lengths[i]:
                        ready: T.let = (positions[i] + j + T.int64(1)) // T.int64(ratio)
                        attend_token(
                            tile, window_size, scale, q, kv, window, rows, None, ready, sinks,
                            positions[i], out, i, j, first_head, blocks,
                        )  # fmt: skip
                    else:
                        zero(tile, out, i, j, first_head, blocks)
        write_window(tile, window_size, kv, window, positions, lengths, b)

    return heavily_compressed_attention


def compressed_sparse_attention(heads: int, width: int, window_size: int, top_k: int, scale: float) -> PrimFunc:
    """Attention over the raw window and the compressed rows that the indexer chose (CSA; V4 paper, section 2.3).

    Arguments of the PrimFunc, float32 unless noted: q ``[B, S, heads, width]``, kv ``[B, S, width]``, window
    ``[B, window_size, width]`` (in place), rows ``[B, N, width]``, indices ``[B, S, top_k]`` int64 (negative: no row),
    sinks ``[heads]``, positions, lengths ``[B]`` int64, out as q. Outputs of padding tokens are zero.
    """
    tile = tiles(heads, width)

    @T.prim_func(private=True, s_tir=True)
    def compressed_sparse_attention(
        q_: T.handle,
        kv_: T.handle,
        window_: T.handle,
        rows_: T.handle,
        indices_: T.handle,
        sinks_: T.handle,
        positions_: T.handle,
        lengths_: T.handle,
        out_: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        b = T.int64()
        s = T.int64()
        n = T.int64()
        q = T.match_buffer(q_, (b, s, T.int64(heads), T.int64(width)), "float32")
        kv = T.match_buffer(kv_, (b, s, T.int64(width)), "float32")
        window = T.match_buffer(window_, (b, T.int64(window_size), T.int64(width)), "float32")
        rows = T.match_buffer(rows_, (b, n, T.int64(width)), "float32")
        indices = T.match_buffer(indices_, (b, s, T.int64(top_k)), "int64")
        sinks = T.match_buffer(sinks_, (T.int64(heads),), "float32")
        positions = T.match_buffer(positions_, (b,), "int64")
        lengths = T.match_buffer(lengths_, (b,), "int64")
        out = T.match_buffer(out_, (b, s, T.int64(heads), T.int64(width)), "float32")
        split: T.let = parts(tile, b * s)
        blocks: T.let = T.truncdiv(T.int64(tile.blocks), split)
        with T.attr(0, "pragma_parallel_launch_point", 1):
            # Every n-th item to a thread: later tokens see more rows, and so cost more.
            with T.attr(0, "pragma_parallel_stride_pattern", 1):
                for item in T.parallel(split * b * s):
                    i: T.let = T.truncdiv(T.truncmod(item, b * s), s)
                    j: T.let = T.truncmod(item, s)
                    first_head: T.let = T.truncdiv(item, b * s) * blocks * T.int64(tile.head_block)
                    if j < lengths[i]:
                        chosen = T.alloc_buffer((T.int64(top_k),), "int64")
                        found: T.int64 = T.int64(0)
                        for a in range(T.int64(top_k)):
                            if indices[i, j, a] >= T.int64(0):
                                chosen[found] = indices[i, j, a]
                                found = found + T.int64(1)
                        attend_token(
                            tile, window_size, scale, q, kv, window, rows, chosen, found, sinks,
                            positions[i], out, i, j, first_head, blocks,
                        )  # fmt: skip
                    else:
                        zero(tile, out, i, j, first_head, blocks)
        write_window(tile, window_size, kv, window, positions, lengths, b)

    return compressed_sparse_attention
