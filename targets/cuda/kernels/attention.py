"""Sliding-window, compressed sparse and heavily compressed attention: one kernel, by which keys a token has.

A factory's `dtype` is what scores and sums are multiplied in: ``float32``, on the ordinary units, or ``bfloat16``, on
tensor cores, where a head's width is a multiple of 16.
"""

from __future__ import annotations

from typing import Any

from ..launch import CTYPES, Buffer, Choice, Launch, ceil_div, device_call, prim_func
from ..schedule import AttentionSchedule
from .attention_tile import THREADS, HeadTile, prompt_tile, split_tile

_HEADS_PER_WARP = 2
_ROUNDING_BLOCKS = 1056  # eight for each of 132 processors


def sliding_window_attention(
    heads: int, width: int, window: int, scale: float, rotary: int, dtype: str, schedule: AttentionSchedule
) -> Any:
    """Attention over the window (V4 paper, section 2.3).

    Arguments of the PrimFunc, float32 unless noted: q ``[B, S, H, C]``, kv ``[B, S, C]``, window ``[B, W, C]`` (in
    place), sinks ``[H]``, positions, lengths ``[B]`` int64, with `rotary` inv_freq ``[rotary / 2]``, out
    ``[B, S, H, C]``, rotated back in its last `rotary` dims.
    """
    return _attention("sliding_window_attention", heads, width, window, 0, 1, scale, rotary, dtype, schedule)


def compressed_sparse_attention(
    heads: int, width: int, window: int, top_k: int, scale: float, rotary: int, dtype: str, schedule: AttentionSchedule
) -> Any:
    """As `sliding_window_attention`, with rows ``[B, N, C]`` and indices ``[B, S, top_k]`` int64 after the window."""
    return _attention("compressed_sparse_attention", heads, width, window, top_k, 1, scale, rotary, dtype, schedule)


def heavily_compressed_attention(
    heads: int, width: int, window: int, ratio: int, scale: float, rotary: int, dtype: str, schedule: AttentionSchedule
) -> Any:
    """As `sliding_window_attention`, with rows ``[B, N, C]`` after the window, of which all that are ready are read."""
    return _attention("heavily_compressed_attention", heads, width, window, -1, ratio, scale, rotary, dtype, schedule)


def _attention(
    name: str, heads: int, width: int, window: int, top_k: int, ratio: int, scale: float, rotary: int, dtype: str,
    schedule: AttentionSchedule,
) -> Any:  # fmt: skip
    half, tokens = rotary // 2, "b * s"
    buffers: dict[str, Buffer] = {
        "q": (("b", "s", heads, width), "float32"),
        "kv": (("b", "s", width), "float32"),
        "window": (("b", window, width), "float32"),
    }
    if top_k:
        buffers["rows"] = (("b", "n", width), "float32")
    if top_k > 0:
        buffers["indices"] = (("b", "s", top_k), "int64")
    buffers |= {"sinks": ((heads,), "float32"), "positions": (("b",), "int64"), "lengths": (("b",), "int64")}
    if rotary:
        buffers["inv_freq"] = ((half,), "float32")
    buffers["out"] = (("b", "s", heads, width), "float32")
    splits, limit = schedule.splits, schedule.split_tokens
    # As many tokens as are ever split: a prompt's chunk does not pay for them.
    held = f"T.min(b * s, {limit})"
    scratch: dict[str, Buffer] = {
        "parts": ((held, splits, heads, width), "float32"), "peaks": ((held, splits, heads, 2), "float32")
    }  # fmt: skip

    inv_freq, rows, n = ("inv_freq" if rotary else "null"), ("rows" if top_k else "null"), ("n" if top_k else "0")
    keys = (window, top_k, ratio, half)

    def arguments(kv: str, ring: str, compressed: str, parts: bool) -> tuple[str | float, ...]:
        return (
            "q", kv, ring, compressed, "indices" if top_k > 0 else "null", "sinks", "positions", "lengths", inv_freq,
            "s", n, scale, *(("parts", "peaks") if parts else ("out", "null")),
        )  # fmt: skip

    def plain(parts: bool) -> Launch:
        warps = min(schedule.warps, -(-heads // _HEADS_PER_WARP))
        call = device_call("attention", heads, width, *keys, warps, parts)
        grid = (tokens, ceil_div(heads, _HEADS_PER_WARP * warps), splits if parts else 1)
        return Launch(call, arguments("kv", "window", rows, parts), grid, 32 * warps)

    def tiles(tile: HeadTile, stored: str, sources: tuple[str, str, str], parts: bool) -> Launch:
        call = device_call(
            "attention_tiles", CTYPES[stored], heads, width, *keys, tile.heads, tile.keys, parts, tile.shared_bytes
        )
        grid = (tokens, ceil_div(heads, tile.heads), splits if parts else 1)
        return Launch(call, (*arguments(*sources, parts), "shared"), grid, THREADS, tile.shared_bytes)

    join = Launch(
        device_call("join_attention", heads, width, window, half, splits),
        ("parts", "peaks", "kv", "window", "sinks", "positions", "lengths", inv_freq, "s", "out"),
        (heads + 1, tokens), 128,
    )  # fmt: skip
    ring = Launch(
        device_call("write_window", width, window), ("kv", "window", "positions", "lengths", "s"), (tokens,), 128
    )
    few, many = [plain(True), join], [plain(False), ring]
    tile = prompt_tile(heads, width, schedule.tile_keys) if dtype == "bfloat16" else None
    if tile is not None:
        # What a chunk's tokens may read, rounded once; of few tokens, whose rows are read as they are, only a row each.
        batch = f"T.min(b * s // {limit + 1}, 1) * b"
        scratch |= {
            "round_kv": ((f"T.max({batch} * s, 1)", width), dtype),
            "round_window": ((f"T.max({batch} * {window}, 1)", width), dtype),
        }
        if top_k:
            scratch["round_rows"] = ((f"T.max({batch} * n, 1)", width), dtype)
        rounded = ("round_kv", "round_window", "round_rows" if top_k else "null")
        blocks = f"T.min({ceil_div(f's + {n} + {window}', 4)}, {_ROUNDING_BLOCKS})"
        few = [tiles(split_tile(width), "float32", ("kv", "window", rows), True), join]
        many = [
            Launch(
                device_call("round_keys", width, window, ratio),
                ("kv", "window", rows, "positions", "lengths", "s", n, *rounded), (blocks, "b"), THREADS,
            ),
            tiles(tile, dtype, rounded, False), ring,
        ]  # fmt: skip
    return prim_func(name, buffers, [Choice([(f"{tokens} <= {limit}", few), ("", many)])], scratch)
