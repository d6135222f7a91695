"""Sliding-window, compressed sparse and heavily compressed attention: one kernel, by which keys a token has."""

from __future__ import annotations

from typing import Any

from ..launch import Buffer, Choice, Launch, Step, ceil_div, device_call, prim_func
from ..schedule import AttentionSchedule

_HEADS_PER_WARP = 2


def sliding_window_attention(
    heads: int, width: int, window: int, scale: float, rotary: int, schedule: AttentionSchedule
) -> Any:
    """Attention over the window (V4 paper, section 2.3).

    Arguments of the PrimFunc, float32 unless noted: q ``[B, S, H, C]``, kv ``[B, S, C]``, window ``[B, W, C]`` (in
    place), sinks ``[H]``, positions, lengths ``[B]`` int64, with `rotary` inv_freq ``[rotary / 2]``, out
    ``[B, S, H, C]``, rotated back in its last `rotary` dims.
    """
    return _attention("sliding_window_attention", heads, width, window, 0, 1, scale, rotary, schedule)


def compressed_sparse_attention(
    heads: int, width: int, window: int, top_k: int, scale: float, rotary: int, schedule: AttentionSchedule
) -> Any:
    """As `sliding_window_attention`, with rows ``[B, N, C]`` and indices ``[B, S, top_k]`` int64 after the window."""
    return _attention("compressed_sparse_attention", heads, width, window, top_k, 1, scale, rotary, schedule)


def heavily_compressed_attention(
    heads: int, width: int, window: int, ratio: int, scale: float, rotary: int, schedule: AttentionSchedule
) -> Any:
    """As `sliding_window_attention`, with rows ``[B, N, C]`` after the window, of which all that are ready are read."""
    return _attention("heavily_compressed_attention", heads, width, window, -1, ratio, scale, rotary, schedule)


def _attention(
    name: str, heads: int, width: int, window: int, top_k: int, ratio: int, scale: float, rotary: int,
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
    scratch: dict[str, Buffer] = {"parts": ((f"T.min(b * s, {limit})", splits, heads, width + 2), "float32")}

    inv_freq = "inv_freq" if rotary else "null"
    warps = min(schedule.warps, -(-heads // _HEADS_PER_WARP))
    inputs = (
        "q", "kv", "window", "rows" if top_k else "null", "indices" if top_k > 0 else "null", "sinks", "positions",
        "lengths", inv_freq, "s", "n" if top_k else "0", scale,
    )  # fmt: skip

    def launch(parts: bool) -> Launch:
        call = device_call("attention", heads, width, window, top_k, ratio, half, warps, parts)
        grid = (tokens, ceil_div(heads, _HEADS_PER_WARP * warps), splits if parts else 1)
        return Launch(call, (*inputs, "parts" if parts else "out"), grid, 32 * warps)

    join = Launch(
        device_call("join_attention", heads, width, window, half, splits),
        ("parts", "kv", "window", "sinks", "positions", "lengths", inv_freq, "s", "out"),
        (-(-heads // 4) + 1, tokens), 128,
    )  # fmt: skip
    ring = Launch(
        device_call("write_window", width, window), ("kv", "window", "positions", "lengths", "s"), (tokens,), 128
    )
    split: list[Step] = [launch(True), join]
    return prim_func(name, buffers, [Choice([(f"{tokens} <= {limit}", split), ("", [launch(False), ring])])], scratch)
