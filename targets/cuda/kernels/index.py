"""The lightning indexer: scores, then the top k, some tokens at a time."""

from __future__ import annotations

from typing import Any

from ..launch import Buffer, Launch, Repeat, Step, ceil_div, device_call, prim_func
from ..schedule import IndexSchedule

_SCORED_ROWS = 64  # by one block


def lightning_index(heads: int, width: int, ratio: int, top_k: int, rotary: int, schedule: IndexSchedule) -> Any:
    """The `top_k` best ready rows of every token (V4 paper, section 2.3).

    Arguments of the PrimFunc: q ``[B, S, J, I]``, weights ``[B, S, J]``, index_rows ``[B, N, I]`` float32, positions,
    lengths ``[B]`` int64, with `rotary` inv_freq ``[rotary / 2]`` (q is then rotated first), indices ``[B, S, top_k]``
    int64: best first, equal scores by the smaller index, -1 behind the last ready row.
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
    q = "q"
    if rotary:
        buffers["inv_freq"] = ((rotary // 2,), "float32")
        scratch["rotated"] = (("b", "s", heads, width), "float32")
        call = device_call("rotate_heads", heads, width, rotary // 2)
        steps = [Launch(call, ("q", "positions", "inv_freq", "s", 1.0, "rotated"), (tokens, ceil_div(heads, 4)), 128)]
        q = "rotated"
    buffers["indices"] = (("b", "s", top_k), "int64")
    first, held = f"t * {schedule.tokens}", f"T.min(b * s, {schedule.tokens})"
    steps.append(Repeat("t", str(ceil_div(tokens, schedule.tokens)), [
        Launch(
            device_call("index_scores", heads, width, ratio),
            (q, "weights", "index_rows", "positions", "lengths", first, tokens, "s", "n", "scores"),
            (ceil_div("n", _SCORED_ROWS), held), 256,
        ),
        Launch(
            device_call("index_top_k", top_k, ratio),
            ("scores", "positions", "lengths", first, tokens, "s", "n", "indices"), (held,), 1024,
        ),
    ]))  # fmt: skip
    return prim_func("lightning_index", buffers, steps, scratch)
