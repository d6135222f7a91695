"""Attention of a prompt's tokens, some neighbours at once: they see nearly the same rows, and share the copies.

A panel holds rows that any of the tokens sees, and each token attends to its own range of them. Only the compressed
rows that an indexer chose are every token's own.
"""

# mypy: ignore-errors
# (TVMScript: names and loops below are parsed by TVM, not run by Python.)

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from .attention_steps import Tiles, attend, copy_raw_row, prefetch_row, start
from .row_formats import CacheRows


@T.inline
def attend_block(
    tile: Tiles,
    stored: CacheRows,
    window_size: int,
    ratio: int,
    scale: float,
    q: Any,
    kv: Any,
    window: Any,
    rows: Any,
    indices: Any,
    top_k: int,
    sinks: Any,
    p: Any,
    out: Any,
    peak: Any,
    total: Any,
    i: Any,
    j: Any,
    tokens: Any,
) -> None:
    """All heads of `tokens` tokens from the j-th of row i over all they see, into `out`, not yet divided by `total`.

    Compressed rows are the finished ones with a `ratio`, those of `indices` with a `top_k`, and none with neither.
    """
    slots = T.meta_var(tile.tokens * tile.blocks)
    packed = T.alloc_buffer((T.int64(slots), T.int64(tile.width), T.int64(tile.head_block)), "float32")
    panel = T.alloc_buffer((T.int64(tile.panel), T.int64(tile.pitch)), "float32")
    scores = T.alloc_buffer((T.int64(tile.panel), T.int64(tile.head_block)), "float32")
    t: T.int64 = p + j
    lowest: T.int64 = T.max(t + T.int64(1 - window_size), T.int64(0))
    for a in range(tokens):
        for g in range(T.int64(tile.blocks)):
            start(
                tile, scale, q, sinks, 1, out, packed, peak, total, i, j + a, j + a, g, a * T.int64(tile.blocks) + g
            )  # fmt: skip

    @T.inline
    def attend_range(a, first, last):
        """The a-th token over the panel's rows from `first` to `last`."""
        for g in range(T.int64(tile.blocks)):
            attend(
                tile, packed, panel, scores, peak, total, out, first, last, i, j + a, g, a * T.int64(tile.blocks) + g
            )  # fmt: skip

    # Panels of raw rows, then of finished ones, cut at multiples of their height: however a prompt is cut into chunks,
    # a token's sums are made in the same order.
    height = T.meta_var(T.int64(tile.panel))
    before: T.int64 = lowest // height
    raw_panels: T.int64 = (t + tokens - T.int64(1)) // height + T.int64(1) - before
    finished: T.int64 = T.int64(0)
    if ratio > 0:
        finished = (t + tokens) // T.int64(ratio)
    for part in range(raw_panels + (finished + height - T.int64(1)) // height):
        if part < raw_panels:
            base: T.int64 = (before + part) * height
            for r in range(height):
                if base + r >= lowest:
                    if base + r < t + tokens:
                        copy_raw_row(stored, window_size, panel, r, kv, window, i, base + r, p)
            for a in range(tokens):
                first: T.int64 = T.max(t + a + T.int64(1 - window_size) - base, T.int64(0))
                last: T.int64 = T.min(t + a + T.int64(1) - base, height)
                if first < last:
                    attend_range(a, first, last)
        elif ratio > 0:
            top: T.int64 = (part - raw_panels) * height
            for r in range(T.min(finished - top, height)):
                stored.read(panel, r, rows, i, top + r)
            for a in range(tokens):
                own: T.int64 = T.min(T.truncdiv(t + a + T.int64(1), T.int64(ratio)) - top, height)
                if own > T.int64(0):
                    attend_range(a, T.int64(0), own)

    if top_k > 0:
        chosen = T.alloc_buffer((T.int64(top_k),), "int64")

        @T.inline
        def ask(of, count):
            """Ask for a panel ahead: its rows lie anywhere, and left to the processor cost more than the arithmetic."""
            for r in range(T.min(count - of * T.int64(tile.panel), T.int64(tile.panel))):
                prefetch_row(stored, rows, i, chosen[of * T.int64(tile.panel) + r])

        for a in range(tokens):
            found: T.int64 = T.int64(0)
            for c in range(T.int64(top_k)):
                if indices[i, j + a, c] >= T.int64(0):
                    chosen[found] = indices[i, j + a, c]
                    found = found + T.int64(1)
            ask(T.int64(0), found)
            for part in range((found + T.int64(tile.panel - 1)) // T.int64(tile.panel)):
                count: T.let = T.min(found - part * T.int64(tile.panel), T.int64(tile.panel))
                for r in range(count):
                    stored.read(panel, r, rows, i, chosen[part * T.int64(tile.panel) + r])
                ask(part + T.int64(1), found)
                attend_range(a, T.int64(0), count)
