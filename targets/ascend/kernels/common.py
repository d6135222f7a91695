"""What generators share: names of programs, and the rows and tokens of a launch."""

from __future__ import annotations

from typing import Any

from ..emit import TileBuilder, Value
from ..program import GridAxis, Polynomial

ROWS = Polynomial.of(1, "rows")
"""Tokens of a launch, for programs that treat each alike."""
BATCH, CHUNK = Polynomial.of(1, "batch"), Polynomial.of(1, "chunk")
"""Sequences of a launch and tokens of each, for programs that know positions."""

SHORT = {"float16": "f16", "bfloat16": "bf16", "float32": "f32", "float8_e4m3fn": "f8", "int32": "i32"}


def program_name(base: str, *sizes: Any) -> str:
    """``base`` and its sizes and dtypes, as a function's name."""
    parts = [SHORT.get(str(s), str(s)) for s in sizes]
    return "_".join([base, *("".join(c if c.isalnum() else "m" if c == "-" else "p" for c in p) for p in parts)])


def fixed(count: int, tile: int = 1) -> GridAxis:
    """A grid axis of a known number of elements."""
    return GridAxis(Polynomial.of(count), tile)


def clamp(b: TileBuilder, x: Any, low: Any, high: Any) -> Any:
    """`x` between two bounds."""
    return b.minimum(b.maximum(x, low), high)


def tile_rows(b: TileBuilder, tile: int, axis: int = 0, extent: str = "rows") -> tuple[Value, Value]:
    """First row of this program's tile, and how many of its rows there are."""
    rows = b.scalar(extent)
    first = b.program_id(axis) * tile
    return first, b.minimum(rows - first, tile)


def tile_columns(b: TileBuilder, width: int, tile: int, axis: int = 1) -> tuple[Any, Any]:
    """First column of this program's tile, and how many of its columns there are."""
    if tile >= width:
        return 0, width
    first = b.program_id(axis) * tile
    return first, tile if width % tile == 0 else b.minimum(width - first, tile)
