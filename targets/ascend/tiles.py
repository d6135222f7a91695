"""Tile sizes from the capacities of a device: how large a piece of a product, or of rows, fits the memories of a core.

A product's operand tiles stand twice in L1, so that the next one loads while one is multiplied, and its accumulator
stands in L0C. Rows of vector work stand in the unified buffer as many times as the generator says it holds them.
"""

from __future__ import annotations

from dataclasses import dataclass

from v4c.errors import UnsupportedError

from .emit import BYTES
from .program import DeviceLimits

CUBE = 16
"""Rows and columns of the cube's smallest product; a tile of fewer rows costs as much."""
_BURST = 32
"""Bytes of the unified buffer's blocks: rows of tiles are laid out to their multiples."""


@dataclass(frozen=True)
class ProductTiles:
    """Extents of one step of a product: ``[m, k] . [k, n]``."""

    m: int
    n: int
    k: int


def power_below(x: float, most: int) -> int:
    """The largest power of two that is at most `x` and at most `most`; at least 1."""
    size = 1
    while 2 * size <= min(x, most):
        size *= 2
    return size


def product_tiles(limits: DeviceLimits, n: int, k: int, dtype: str, rows: int | None = None) -> ProductTiles:
    """Tiles of ``x [rows, k] . weight [n, k]``.

    With few rows (a decode step) the weight is read once whatever the tile, so its tile is chosen to spread the columns
    over all cores; with many, a tile of the accumulator is as square as L0C allows, for least traffic.

    Args:
        limits: of the device.
        n, k: extents of the weight.
        dtype: of both operands.
        rows: how many rows a launch has; None means many.

    Raises:
        UnsupportedError: the device's cube does not multiply `dtype`.
    """
    if dtype not in limits.dtypes:
        known = ", ".join(sorted(limits.dtypes))
        raise UnsupportedError(f"{limits.name}: products of {dtype}: expected one of {known}")
    size = BYTES[dtype]
    m = 128 if rows is None else min(128, max(CUBE, 1 << (rows - 1).bit_length()))
    # With many rows the whole of L0C, for fewest reads; with few half of it, so that a tile is written out while the
    # next one is multiplied.
    widest = power_below(limits.l0c / (4 * m) / (1 if rows is None else 2), 256)
    if rows is not None:
        widest = min(widest, power_below(max(n / limits.cube_cores, 64), 256))
    n_tile = min(widest, -(-n // CUBE) * CUBE)
    depth = power_below(limits.l1 / 2 / ((m + n_tile) * size), 512)
    while k % depth and depth > CUBE:
        depth //= 2
    return ProductTiles(m, n_tile, min(depth, k))


def row_tile(limits: DeviceLimits, width: int, live: float, most: int = 64, share: float = 0.8) -> int:
    """Rows of `width` elements for which `live` float32 copies fit `share` of the unified buffer.

    Raises:
        UnsupportedError: not even one row fits.
    """
    row = -(-4 * width // _BURST) * _BURST
    fit = share * limits.unified_buffer / (row * live)
    if fit < 1:
        need = int(row * live / share)
        raise UnsupportedError(
            f"{limits.name}: a row of {width} elements needs {need} bytes of the unified buffer: "
            f"expected at most {limits.unified_buffer}"
        )
    return power_below(fit, most)


def column_tile(limits: DeviceLimits, width: int, rows: int, live: float, share: float = 0.8) -> int:
    """Columns of which `rows` rows fit `live` times; a divisor of `width` where a power of two allows one."""
    fit = power_below(share * limits.unified_buffer / (4 * rows * live), 1 << 30)
    if fit >= width:
        return width
    tile = fit
    while width % tile and tile > 8:
        tile //= 2
    return tile if width % tile == 0 else fit
