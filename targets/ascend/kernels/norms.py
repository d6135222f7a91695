"""RMSNorm of rows, with a weight or without (V4 paper, section 2.3); statistics in float32."""

from __future__ import annotations

from ..emit import TileBuilder
from ..program import DeviceLimits, GridAxis, Role, TileProgram
from ..tiles import row_tile
from .common import ROWS, program_name, tile_rows


def rms_norm(
    width: int, eps: float, limits: DeviceLimits, *, weighted: bool = True, dtype: str = "float16",
    out: str = "float16", names: tuple[str, str, str] = ("x", "weight", "y"),
) -> TileProgram:  # fmt: skip
    """``x [rows, D]`` of `dtype` (and ``weight [D]`` float32) to ``y [rows, D]`` of `out`.

    ``y = x / sqrt(mean(x^2) + eps) . weight``, the mean over D.

    Raises:
        UnsupportedError: a row does not fit the unified buffer.
    """
    tile = row_tile(limits, width, live=5)
    b = TileBuilder(program_name("rms_norm", width, dtype, out, "w" if weighted else "u"), "RMSNormalization")
    x = b.argument(names[0], ("rows", width), dtype)
    weight = b.argument(names[1], (width,), "float32") if weighted else None
    y = b.argument(names[2], ("rows", width), out, Role.WRITE)
    first, live = tile_rows(b, tile)
    values = b.cast(b.load(x, first * width, (tile, width), valid=(live, width)), "float32")
    root = b.unary("rsqrt", b.reduce(values * values, 1) * (1 / width) + eps)
    normed = values * b.broadcast(root, (tile, width), 1)
    if weight is not None:
        normed = normed * b.broadcast(b.load(weight, 0, (width,)), (tile, width), 0)
    b.store(b.cast(normed, out), y, first * width, valid=(live, width))
    return b.finish([GridAxis(ROWS, tile)])
