"""The lightning indexer: scores, then the top k, some tokens at a time."""

from __future__ import annotations

from typing import Any

from ..launch import CTYPES, Buffer, Launch, Repeat, Step, ceil_div, device_call, prim_func
from ..schedule import IndexSchedule

_SCORED_ROWS = 64  # by one block
_TILE_ROWS, _TILE_TOKENS = 256, 8  # on tensor cores
_MOST_WIDTH = 128  # of rows that warps keep in registers


def lightning_index(
    heads: int, width: int, ratio: int, top_k: int, rotary: int, dtype: str, schedule: IndexSchedule
) -> Any:
    """The `top_k` best ready rows of every token (V4 paper, section 2.3).

    Arguments of the PrimFunc: q ``[B, S, J, I]``, weights ``[B, S, J]``, index_rows ``[B, N, I]`` float32, positions,
    lengths ``[B]`` int64, with `rotary` inv_freq ``[rotary / 2]`` (q is then rotated first), indices ``[B, S, top_k]``
    int64: best first, equal scores by the smaller index, -1 behind the last ready row. `dtype` bfloat16 rounds q and
    rows for the scores, which are then computed on tensor cores, where a row has up to 128 dims, a multiple of 16.
    """
    tokens = "b * s"
    buffers: dict[str, Buffer] = {
        "q": (("b", "s", heads, width), "float32"),
        "weights": (("b", "s", heads), "float32"),
        "index_rows": (("b", "n", width), "float32"),
        "positions": (("b",), "int64"),
        "lengths": (("b",), "int64"),
    }
    steps: list[Step] = []
    scratch: dict[str, Buffer] = {"scores": ((f"T.min(b * s, {schedule.tokens})", "n"), "float32")}
    q, tiles = "q", dtype == "bfloat16" and width % 16 == 0 and width <= _MOST_WIDTH
    if rotary:
        buffers["inv_freq"] = ((rotary // 2,), "float32")
    if rotary or tiles:
        q, stored = "rotated", dtype if tiles else "float32"
        scratch[q] = (("b", "s", heads, width), stored)
        call = device_call("rotate_heads", CTYPES[stored], heads, width, rotary // 2)
        arguments = ("q", "positions", "inv_freq" if rotary else "null", "s", 1.0, q)
        steps = [Launch(call, arguments, (tokens, ceil_div(heads, 4)), 128)]
    buffers["indices"] = (("b", "s", top_k), "int64")
    first, held = f"t * {schedule.tokens}", f"T.min(b * s, {schedule.tokens})"
    sources = (q, "weights", "index_rows", "positions", "lengths", first, tokens, "s", "n", "scores")
    if tiles:
        memory = 2 * (16 * -(-heads // 16)) * (2 * width + (16 if width % 64 else 0))  # of two tokens' queries
        scores = Launch(
            device_call("index_scores_tiles", heads, width, ratio, _TILE_TOKENS, memory), (*sources, "shared"),
            (ceil_div("n", _TILE_ROWS), ceil_div(held, _TILE_TOKENS)), 256, memory,
        )  # fmt: skip
    else:
        call = device_call("index_scores", heads, width, ratio)
        scores = Launch(call, sources, (ceil_div("n", _SCORED_ROWS), held), 256)
    steps.append(Repeat("t", str(ceil_div(tokens, schedule.tokens)), [
        scores,
        Launch(
            device_call("index_top_k", top_k, ratio),
            ("scores", "positions", "lengths", first, tokens, "s", "n", "indices"), (held,), 1024,
        ),
    ]))  # fmt: skip
    return prim_func("lightning_index", buffers, steps, scratch)
