"""Clamped SwiGLU, and the sum of two results."""

from __future__ import annotations

from ..emit import TileBuilder, Value
from ..program import DeviceLimits, GridAxis, Role, TileProgram
from ..tiles import column_tile
from .common import ROWS, fixed, program_name, tile_columns, tile_rows


def gated(b: TileBuilder, gate: Value, up: Value, limit: float) -> Value:
    """``silu(min(gate, limit)) . clamp(up, -limit, limit)`` of float32 tiles."""
    gate = b.minimum(gate, limit)
    sigmoid = 1.0 / (b.unary("exp", gate * -1.0) + 1.0)
    return gate * sigmoid * b.maximum(b.minimum(up, limit), -limit)


def swiglu(
    width: int, limit: float, limits: DeviceLimits, *, dtype: str = "float16", joined: bool = False,
    op: str = "ClampedSwiGLU", rows: str = "rows", names: tuple[str, ...] = ("gate", "up", "y"),
) -> TileProgram:  # fmt: skip
    """``gate`` and ``up [rows, F]`` to ``y [rows, F]``; `joined` takes both from one ``[rows, 2F]``, gate first.

    Args:
        width: F.
        limit: the model's ``swiglu_limit``.
        limits: of the device.
        dtype: of inputs and output; computed in float32.
        joined: whether gate and up are halves of one buffer.
        op: the op of the model.
        rows: name of the extent.
        names: of the buffers; of a joined one the first and the last.
    """
    tile = 8
    columns = column_tile(limits, width, tile, live=9)
    b = TileBuilder(program_name("swiglu", width, dtype, *(["joined"] if joined else []), rows), op)
    stride = 2 * width if joined else width
    gate = b.argument(names[0], (rows, stride), dtype)
    up = gate if joined else b.argument(names[1], (rows, width), dtype)
    y = b.argument(names[-1], (rows, width), dtype, Role.WRITE)
    first, live = tile_rows(b, tile, extent=rows)
    column, wide = tile_columns(b, width, columns)
    start = first * stride + column
    shape, valid = (tile, columns), (live, wide)
    gates, ups = (
        b.cast(b.load(source, at, shape, (stride, 1), valid), "float32")
        for source, at in ((gate, start), (up, start + width if joined else start))
    )
    b.store(b.cast(gated(b, gates, ups, limit), dtype), y, first * width + column, (width, 1), valid)
    return b.finish([GridAxis(type(ROWS).of(1, rows), tile), fixed(width, columns)])


def add(
    width: int, limits: DeviceLimits, *, dtype: str = "float16", names: tuple[str, str, str] = ("left", "right", "y")
) -> TileProgram:
    """``y = left + right``, all ``[rows, D]`` of `dtype`; the sum of routed and shared experts."""
    tile = 8
    columns = column_tile(limits, width, tile, live=6)
    b = TileBuilder(program_name("add", width, dtype), "Add")
    left, right = (b.argument(n, ("rows", width), dtype) for n in names[:2])
    y = b.argument(names[2], ("rows", width), dtype, Role.WRITE)
    first, live = tile_rows(b, tile)
    column, wide = tile_columns(b, width, columns)
    start = first * width + column
    parts = [b.cast(b.load(s, start, (tile, columns), (width, 1), (live, wide)), "float32") for s in (left, right)]
    b.store(b.cast(parts[0] + parts[1], dtype), y, start, (width, 1), (live, wide))
    return b.finish([GridAxis(ROWS, tile), fixed(width, columns)])
