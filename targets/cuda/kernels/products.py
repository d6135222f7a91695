"""Products of the projections: few rows read each weight once, many rows go through tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import coded_rows
from ..launch import CTYPES, Buffer, Choice, Dim, Launch, Step, ceil_div, device_call, prim_func, widths
from ..schedule import ProductSchedule

_WARPS = 4  # of a block of few rows
TILE_BYTES = {64: 4 * (64 + 128) * 64, 128: 4 * (128 + 128) * 64}
"""Shared memory of a tile of so many rows: four stages of two operands, 64 bytes a row. Coded weights take no more:
four stages of 32 bytes, and two of 64."""

WEIGHTS = {"float32": CTYPES["float32"], "bfloat16": CTYPES["bfloat16"], **coded_rows.CTYPES}
"""Storage dtypes of products' weights to the types by which the device functions know them."""


def weight_buffer(lead: Sequence[Dim], k: int, dtype: str) -> Buffer:
    """The buffer of weights ``[*lead, k]`` stored as `dtype`."""
    if dtype in coded_rows.CTYPES:
        return (*lead, coded_rows.row_bytes(k, dtype)), "uint8"
    return (*lead, k), dtype


def matrix_units(dtype: str, k: int) -> bool:
    """Whether tensor cores multiply: the weights may be rounded to bfloat16, and rows are whole copies of 16 bytes."""
    return dtype != "float32" and k % 8 == 0


def merged_linear(sizes: tuple[int, ...], k: int, dtype: str, norm_eps: float | None, schedule: ProductSchedule) -> Any:
    """``x [m, K]`` float32 (normed first where `norm_eps` is given) times a weight ``[sum(sizes), K]`` of `dtype`.

    Arguments of the PrimFunc: x, with `norm_eps` the norm's weight ``[K]``, weight, and a float32 ``[m, n]`` per size.
    """
    outputs = {f"out{i}": (("m", n), "float32") for i, n in enumerate(sizes)}
    norm = {"norm": ((k,), "float32")} if norm_eps is not None else {}
    buffers = {"x": (("m", k), "float32"), **norm, "w": weight_buffer((sum(sizes),), k, dtype), **outputs}
    steps, scratch = product_steps(1, sizes, k, dtype, norm_eps, schedule, tuple(outputs))
    return prim_func("merged_linear", buffers, steps, scratch)


def grouped_linear(groups: int, n: int, k: int, dtype: str, schedule: ProductSchedule) -> Any:
    """``x [m, G, K]`` float32 times a weight ``[G * N, K]`` of `dtype`, block-diagonal, to ``[m, G, N]``."""
    buffers = {
        "x": (("m", groups, k), "float32"), "w": weight_buffer((groups * n,), k, dtype),
        "out0": (("m", groups, n), "float32"),
    }  # fmt: skip
    steps, scratch = product_steps(groups, (n,), k, dtype, None, schedule, ("out0",))
    return prim_func("grouped_linear", buffers, steps, scratch)


def product_steps(
    groups: int, sizes: tuple[int, ...], k: int, dtype: str, norm_eps: float | None, schedule: ProductSchedule,
    outputs: tuple[str, ...], rows: str = "m",
) -> tuple[list[Step], dict[str, Any]]:  # fmt: skip
    """Launches of a product of buffers `x` and `w`, of so many `rows` as that text says, and the memory they need."""
    x, w = "x", "w"
    ctype, parts, n = WEIGHTS[dtype], widths(sizes), sum(sizes)
    normed = norm_eps is not None
    norm: tuple[str | float, ...] = ("norm" if normed else "null", w, rows, norm_eps or 0.0)

    def few(most: int) -> list[Step]:
        outs = schedule.outputs_per_warp(n * groups, most)
        call = device_call("gemv", ctype, k, most, outs, normed, groups, parts)
        return [Launch(call, (x, *norm, *outputs), (ceil_div(n, _WARPS * outs), groups), _WARPS * 32)]

    cases: list[tuple[str, list[Step]]] = [
        (f"{rows} <= {most}", few(most)) for most in (1, 2, 4, 8) if most <= schedule.few_rows
    ]
    units = matrix_units(dtype, k)
    scratch: dict[str, Any] = {}
    many: list[Step] = []
    source = x
    if units or normed:
        made = "bfloat16" if units else "float32"
        scratch = {"prepared": ((rows, groups, k), made)}
        call = device_call("prepare_rows", CTYPES[made], k, normed)
        many = [
            Launch(call, (x, "norm" if normed else "null", norm_eps or 0.0, "prepared"), (f"{rows} * {groups}",), 256)
        ]
        source = "prepared"
    if units:

        def tiles(height: int) -> Step:
            call = device_call("gemm", height, ctype, k, groups, parts)
            grid = (ceil_div(n, 128), ceil_div(rows, height), groups)
            return Launch(call, (source, w, rows, "shared", *outputs), grid, 256, TILE_BYTES[height])

        many.append(Choice([(f"{rows} <= {schedule.small_tile_rows}", [tiles(64)]), ("", [tiles(128)])]))
    else:
        call = device_call("gemm_f32", ctype, k, groups, parts)
        grid = (ceil_div(n, 64), ceil_div(rows, 64), groups)
        many.append(Launch(call, (source, w, rows, *outputs), grid, 256))
    return [Choice([*cases, ("", many)])], scratch
