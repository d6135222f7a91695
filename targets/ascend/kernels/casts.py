"""Rows in another element type: between ops, whose activations are float32, and products, which take half precision."""

from __future__ import annotations

from ..emit import TileBuilder
from ..program import DeviceLimits, GridAxis, Role, TileProgram
from ..tiles import column_tile
from .common import ROWS, fixed, program_name, tile_columns, tile_rows


def cast_rows(
    width: int, source: str, target: str, limits: DeviceLimits, *, op: str = "Cast", names: tuple[str, str] = ("x", "y")
) -> TileProgram:
    """``x [rows, D]`` of dtype `source` to ``y [rows, D]`` of `target`, to the nearest.

    Args:
        width: D.
        source, target: dtypes.
        limits: of the device.
        op: the op of the model.
        names: of the two buffers.
    """
    tile = 8
    columns = column_tile(limits, width, tile, live=4)
    b = TileBuilder(program_name("cast", width, source, target, names[1]), op)
    x = b.argument(names[0], ("rows", width), source)
    y = b.argument(names[1], ("rows", width), target, Role.WRITE)
    first, live = tile_rows(b, tile)
    column, wide = tile_columns(b, width, columns)
    start = first * width + column
    values = b.load(x, start, (tile, columns), (width, 1), (live, wide))
    b.store(b.cast(values, target), y, start, (width, 1), (live, wide))
    return b.finish([GridAxis(ROWS, tile), fixed(width, columns)])
