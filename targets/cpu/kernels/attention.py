"""The three attention kernels of the CPU: sliding window, compressed sparse (CSA) and heavily compressed (HCA).

They differ only in which compressed rows follow the raw ones, so they are one frame. A work item is some neighbouring
tokens, or, where tokens are too few to feed the threads, a share of the rows one sees. The window rings are written
last, in a loop of their own.
"""

# mypy: ignore-errors
# (TVMScript: names and loops below are parsed by TVM, not run by Python.)

from __future__ import annotations

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from ..schedule import AttentionSchedule
from .attention_block import attend_block
from .attention_split import close_share, merge
from .attention_steps import (
    attend_rows,
    encode_rows,
    finish,
    rotate_back,
    softmax_state,
    tiles,
    write_window,
    zero,
)
from .row_formats import cache_rows

DEFAULT = AttentionSchedule()


def sliding_window_attention(
    heads: int, width: int, window_size: int, scale: float, rotary_width: int = 0, rows: str = "float32",
    schedule: AttentionSchedule = DEFAULT,
) -> PrimFunc:  # fmt: skip
    """Attention over the last `window_size` raw rows, the token's own included (V4 paper, section 2.3).

    Arguments of the PrimFunc, float32 unless noted: q ``[B, S, heads, width]``, kv ``[B, S, width]``, window
    ``[B, window_size, width]`` (in place), sinks ``[heads]``, positions, lengths ``[B]`` int64, with `rotary_width`
    inv_freq ``[rotary_width / 2]``, out as q. With `rotary_width`, that many trailing dims of out are rotated back by
    the token's position. Outputs of padding tokens are zero.

    `rows` is the format of the caches (`row_formats`), which says what stands in their last dimension. Rows of the
    chunk are read as the window will have them, so how a text is cut into chunks makes no difference.
    """
    return _attention(heads, width, window_size, scale, rotary_width, rows, schedule)


def heavily_compressed_attention(
    heads: int, width: int, window_size: int, ratio: int, scale: float, rotary_width: int = 0, rows: str = "float32",
    schedule: AttentionSchedule = DEFAULT,
) -> PrimFunc:  # fmt: skip
    """Attention over the raw window and every finished compressed row (HCA; V4 paper, section 2.3).

    Arguments of the PrimFunc: those of `sliding_window_attention`, with rows ``[B, N, width]`` after window. The token
    at position t sees rows ``w < (t + 1) // ratio``.
    """
    return _attention(heads, width, window_size, scale, rotary_width, rows, schedule, ratio=ratio)


def compressed_sparse_attention(
    heads: int, width: int, window_size: int, top_k: int, scale: float, rotary_width: int = 0, rows: str = "float32",
    schedule: AttentionSchedule = DEFAULT,
) -> PrimFunc:  # fmt: skip
    """Attention over the raw window and the compressed rows that the indexer chose (CSA; V4 paper, section 2.3).

    Arguments of the PrimFunc: those of `sliding_window_attention`, with rows ``[B, N, width]`` and indices
    ``[B, S, top_k]`` int64 (negative: no row) after window.
    """
    return _attention(heads, width, window_size, scale, rotary_width, rows, schedule, top_k=top_k)


def _attention(
    heads: int, width: int, window_size: int, scale: float, rotary_width: int, row_format: str,
    schedule: AttentionSchedule, ratio: int = 0, top_k: int = 0,
) -> PrimFunc:  # fmt: skip
    """The frame: the first rows with a `ratio`, chosen rows with a `top_k`, and no compressed rows with neither."""
    tile = tiles(heads, width, schedule)
    stored = cache_rows(width, row_format)
    half = rotary_width // 2
    has_rows = ratio > 0 or top_k > 0

    @T.prim_func(private=True, s_tir=True)
    def attention(
        q_: T.handle,
        kv_: T.handle,
        window_: T.handle,
        rows_: T.handle,
        indices_: T.handle,
        sinks_: T.handle,
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
        kv = T.match_buffer(kv_, (b, s, T.int64(width)), "float32")
        window = T.match_buffer(window_, (b, T.int64(window_size), T.int64(stored.columns)), stored.dtype)
        rows = T.match_buffer(rows_, (b, n, T.int64(stored.columns)), stored.dtype)
        indices = T.match_buffer(indices_, (b, s, T.int64(top_k)), "int64")
        sinks = T.match_buffer(sinks_, (T.int64(heads),), "float32")
        positions = T.match_buffer(positions_, (b,), "int64")
        lengths = T.match_buffer(lengths_, (b,), "int64")
        inv_freq = T.match_buffer(inv_freq_, (T.int64(half),), "float32")
        out = T.match_buffer(out_, (b, s, T.int64(heads), T.int64(width)), "float32")

        if stored.narrow:
            own = T.alloc_buffer((b, s, T.int64(stored.columns)), stored.scratch_dtype)
            encode_rows(stored, kv.view(b * s, T.int64(width)), own, lengths, b, s)
        else:
            own = T.meta_var(kv)

        @T.inline
        def attend_panels(i, j, parts, part, target, peak, total, at):
            """The `part`-th of `parts` parts of the panels of rows that token j of row i sees."""
            if top_k > 0:
                chosen = T.alloc_buffer((T.int64(top_k),), "int64")
                compressed: T.int64 = T.int64(0)
                for a in range(T.int64(top_k)):
                    if indices[i, j, a] >= T.int64(0):
                        chosen[compressed] = indices[i, j, a]
                        compressed = compressed + T.int64(1)
            else:
                chosen = T.meta_var(None)
                if ratio > 0:
                    compressed: T.let = (positions[i] + j + T.int64(1)) // T.int64(ratio)
                else:
                    compressed = T.meta_var(T.int64(0))
            seen: T.let = T.min(positions[i] + j + T.int64(1), T.int64(window_size)) + compressed
            panels: T.let = (seen + T.int64(tile.panel - 1)) // T.int64(tile.panel)
            attend_rows(
                tile, stored, window_size, scale, 0, q, own, window, rows if has_rows else None, chosen, compressed,
                sinks, positions[i], target, peak, total, i, j, at,
                panels * part // T.int64(parts), panels * (part + T.int64(1)) // T.int64(parts),
            )  # fmt: skip

        if b * s < T.int64(schedule.enough_tokens * tile.tokens):
            partial = T.alloc_buffer((b, s * T.int64(tile.shares), T.int64(heads), T.int64(width)), "float32")
            peaks = T.alloc_buffer((b, s * T.int64(tile.shares), T.int64(heads)), "float32")
            totals = T.alloc_buffer((b, s * T.int64(tile.shares), T.int64(heads)), "float32")
            for item in T.parallel(b * s * T.int64(tile.shares)):
                i: T.let = T.truncdiv(item, s * T.int64(tile.shares))
                j: T.let = T.truncmod(item // T.int64(tile.shares), s)
                if j < lengths[i]:
                    peak, total = softmax_state(tile)
                    at: T.let = j * T.int64(tile.shares) + item % T.int64(tile.shares)
                    attend_panels(i, j, tile.shares, item % T.int64(tile.shares), partial, peak, total, at)
                    close_share(tile, peak, total, peaks, totals, i, at)

            @T.inline
            def merge_block(item):
                i: T.let = T.truncdiv(item, s * T.int64(tile.blocks))
                j: T.let = T.truncmod(item // T.int64(tile.blocks), s)
                first: T.let = item % T.int64(tile.blocks) * T.int64(tile.head_block)
                if j < lengths[i]:
                    for h in range(T.int64(tile.head_block)):
                        merge(tile, partial, peaks, totals, sinks, out, i, j, first + h)
                    if half > 0:
                        rotate_back(tile, half, inv_freq, positions[i] + j, out, i, j, first, tile.head_block)
                else:
                    zero(tile, out, i, j, first, tile.head_block)

            if tile.blocks > 1:
                for item in T.parallel(b * s * T.int64(tile.blocks)):
                    merge_block(item)
            else:  # too little to start threads for
                for item in range(b * s):
                    merge_block(item)
        else:
            blocks: T.int64 = T.truncdiv(s + T.int64(tile.tokens - 1), T.int64(tile.tokens))
            with T.attr(0, "pragma_parallel_launch_point", 1):
                # Every n-th item to a thread: later tokens see more rows, and so cost more.
                with T.attr(0, "pragma_parallel_stride_pattern", 1):
                    for item in T.parallel(b * blocks):
                        i: T.let = T.truncdiv(item, blocks)
                        j: T.let = T.truncmod(item, blocks) * T.int64(tile.tokens)
                        tokens: T.int64 = T.min(T.max(lengths[i] - j, T.int64(0)), T.int64(tile.tokens))
                        if tokens > T.int64(0):
                            peak, total = softmax_state(tile, tile.tokens)
                            attend_block(
                                tile, stored, window_size, ratio, scale, q, own, window, rows if has_rows else None,
                                indices if top_k > 0 else None, top_k, sinks, positions[i], out, peak, total, i, j,
                                tokens,
                            )  # fmt: skip
                            for a in range(tokens):
                                finish(tile, total, out, i, j + a, a)
                                if half > 0:
                                    rotate_back(
                                        tile, half, inv_freq, positions[i] + j + a, out, i, j + a, T.int64(0), heads
                                    )  # fmt: skip
                        for a in range(T.min(s - j, T.int64(tile.tokens)) - tokens):
                            zero(tile, out, i, j + tokens + a, T.int64(0), heads)
        write_window(stored, window_size, own, window, positions, lengths, b)

    # Names that the body of this variant does not use are no parameters of it.
    has = {"rows": has_rows, "indices": top_k > 0, "inv_freq": half > 0}
    params = [p for p in attention.params if has.get(p.name, True)]
    return PrimFunc(params, attention.body, attention.ret_type, attention.attrs)
