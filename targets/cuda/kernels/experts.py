"""Routed experts, alone or with the shared one."""

from __future__ import annotations

from typing import Any

from ..launch import CTYPES, Buffer, Choice, Launch, Step, ceil_div, device_call, prim_func
from ..schedule import ExpertSchedule
from .products import TILE_BYTES, WEIGHTS, matrix_units, weight_buffer


def grouped_experts(
    experts: int, d: int, f: int, top_k: int, limit: float, dtype: str, schedule: ExpertSchedule
) -> Any:
    """Weighted sum of each token's experts (V4 paper, section 2.1).

    Arguments of the PrimFunc: x ``[B, S, D]`` float32, weights ``[B, S, K]`` float32, indices ``[B, S, K]`` int64 (-1
    is none), gate_up ``[E, 2F, D]`` and down ``[E, D, F]`` of `dtype`, y ``[B, S, D]`` float32.
    """
    return _experts("grouped_experts", experts, d, f, top_k, limit, dtype, 0, dtype, schedule)


def mixture_of_experts(
    experts: int, d: int, f: int, top_k: int, limit: float, dtype: str, shared: int, shared_dtype: str,
    schedule: ExpertSchedule,
) -> Any:  # fmt: skip
    """As `grouped_experts`, plus a shared expert of width `shared`: ``[2G, D]`` and ``[D, G]`` follow `down`."""
    return _experts("mixture_of_experts", experts, d, f, top_k, limit, dtype, shared, shared_dtype, schedule)


def _experts(
    name: str, experts: int, d: int, f: int, top_k: int, limit: float, dtype: str, shared: int, shared_dtype: str,
    schedule: ExpertSchedule,
) -> Any:  # fmt: skip
    ctype, shared_ctype = WEIGHTS[dtype], WEIGHTS[shared_dtype]
    units = matrix_units(dtype, d) and matrix_units(shared_dtype, d) and f % 8 == 0 and shared % 8 == 0
    tile = schedule.tile_rows if units else 64
    tokens, pairs = "b * s", f"b * s * {top_k}"
    buffers: dict[str, Buffer] = {
        "x": (("b", "s", d), "float32"),
        "weights": (("b", "s", top_k), "float32"),
        "indices": (("b", "s", top_k), "int64"),
        "gate_up": weight_buffer((experts, 2 * f), d, dtype),
        "down": weight_buffer((experts, d), f, dtype),
    }
    if shared:
        buffers["shared_gate_up"] = weight_buffer((2 * shared,), d, shared_dtype)
        buffers["shared_down"] = weight_buffer((d,), shared, shared_dtype)
    buffers["y"] = (("b", "s", d), "float32")

    # Float32 of either path; the tiles of the tensor cores use the same memory as bfloat16.
    scratch: dict[str, Buffer] = {"hidden": ((pairs, f), "float32"), "outputs": ((pairs, d), "float32")}
    scratch |= {"order": ((pairs,), "int32"), "tiles": ((f"({pairs}) // {tile} + {experts}", 3), "int32")}
    if shared:
        scratch |= {"shared_hidden": ((tokens, shared), "float32"), "shared_outputs": ((tokens, d), "float32")}
    if units:
        scratch["prepared"] = ((tokens, d), "bfloat16")
        scratch["tile_hidden"] = ((pairs, f), "bfloat16")
        if shared:
            scratch["tile_shared"] = ((tokens, shared), "bfloat16")

    few: list[Step] = [
        Launch(
            device_call("expert_hidden_few", ctype, d, f, top_k), ("x", "indices", "gate_up", limit, "hidden"),
            (ceil_div(f, 4), pairs), 128,
        ),
    ]  # fmt: skip
    if shared:
        call = device_call("expert_hidden_few", shared_ctype, d, shared, 1)
        few.append(Launch(
            call, ("x", "null", "shared_gate_up", limit, "shared_hidden"), (ceil_div(shared, 4), tokens), 128
        ))  # fmt: skip
    few.append(Launch(
        device_call("expert_outputs_few", ctype, shared_ctype, d, f, top_k, shared),
        ("hidden", "shared_hidden" if shared else "null", "weights", "indices", "down",
         "shared_down" if shared else "null", "y"), (ceil_div(d, 4), tokens), 128,
    ))  # fmt: skip

    many: list[Step] = [
        Launch(device_call("sort_pairs", experts, tile), ("indices", pairs, "order", "tiles"), (1,), 1024),
    ]
    x = "x"
    if units:
        call = device_call("prepare_rows", CTYPES["bfloat16"], d, False)
        many.append(Launch(call, ("x", "null", 0.0, "prepared"), (tokens,), 256))
        x = "prepared"
    for routed in (True, False) if shared else (True,):
        rows = pairs if routed else tokens
        order = ("order", "tiles") if routed else ("null", "null")
        width = f if routed else shared
        gate_up, down = ("gate_up", "down") if routed else ("shared_gate_up", "shared_down")
        hidden = ("tile_hidden" if routed else "tile_shared") if units else "hidden" if routed else "shared_hidden"
        runs = f"({pairs}) // {tile} + {experts}" if routed else ceil_div(tokens, tile)
        made, columns = ("outputs" if routed else "shared_outputs"), 128 if units else 64
        per_token, suffix = (top_k if routed else 1), "" if units else "_f32"
        stored = ctype if routed else shared_ctype
        first = (tile, stored) if units else (stored,)
        memory, extra = (TILE_BYTES[tile], ("shared",)) if units else (0, ())
        many += [
            Launch(
                device_call(f"expert_hidden{suffix}", *first, d, width, per_token),
                (x, *order, gate_up, rows, limit, hidden, *extra), (ceil_div(width, columns // 2), runs), 256, memory,
            ),
            Launch(
                device_call(f"expert_outputs{suffix}", *first, d, width),
                (hidden, *order, down, "weights" if routed else "null", rows, made, *extra),
                (ceil_div(d, columns), runs), 256, memory,
            ),
        ]  # fmt: skip
    call = device_call("add_experts", d, top_k)
    many.append(Launch(call, ("outputs", "indices", "shared_outputs" if shared else "null", "y"), (tokens,), 256))
    return prim_func(name, buffers, [Choice([(f"{tokens} <= {schedule.few_tokens}", few), ("", many)])], scratch)
