"""Products with a weight: ``y = x . weight^T``, whole or block-diagonal, in float16, bfloat16 or float32, and in FP8.

The weight lies as in checkpoints, ``[n, k]``: its tiles are transposed on their way into the cube, which costs nothing.
Rows and columns beyond the ends are neither read nor written.
"""

from __future__ import annotations

from v4c.errors import UnsupportedError

from ..emit import TileBuilder
from ..program import DeviceLimits, GridAxis, Role, TileProgram, Work
from ..tiles import ProductTiles, power_below, product_tiles
from .common import ROWS, fixed, program_name, tile_columns, tile_rows

FP8 = "float8_e4m3fn"
FP8_LARGEST = 448.0
"""Largest finite number of e4m3 (OCP 8-bit floating point specification, table 1)."""
FP8_BLOCK = 128
"""Rows and columns of a weight that share a scale in V4 checkpoints."""


def linear(
    n: int, k: int, limits: DeviceLimits, *, dtype: str = "float16", out: str = "float16", rows: int | None = None,
    groups: int = 1, op: str = "MatMul", names: tuple[str, str, str] = ("x", "weight", "y"),
    tiles: ProductTiles | None = None,
) -> TileProgram:  # fmt: skip
    """``x [rows, G, k]`` and ``weight [G, n, k]`` of `dtype` to ``y [rows, G, n]`` of `out`; with G = 1 no such axis.

    Args:
        n, k: outputs and inputs of a group.
        limits: of the device.
        dtype: of both operands; sums are float32.
        out: of the result.
        rows: rows of a launch that the tiles are chosen for, None for many; any number of rows is computed.
        groups: blocks of a block-diagonal weight.
        op: the op of the model.
        names: of the three buffers.
        tiles: in place of those that the limits give.
    """
    tiles = tiles or product_tiles(limits, n, k, dtype, rows)
    b = TileBuilder(program_name("linear", *([groups] if groups > 1 else []), n, k, dtype, out, tiles.m), op, Work.CUBE)
    middle = (groups,) if groups > 1 else ()
    x = b.argument(names[0], ("rows", *middle, k), dtype)
    weight = b.argument(names[1], (*middle, n, k), dtype)
    y = b.argument(names[2], ("rows", *middle, n), out, Role.WRITE)
    first, live = tile_rows(b, tiles.m)
    column, wide = tile_columns(b, n, tiles.n)
    group = b.program_id(2) if groups > 1 else 0
    x_start, w_start = first * (groups * k) + group * k, (group * n + column) * k
    with b.loop(k, tiles.k, carried=[b.fill(0.0, (tiles.m, tiles.n))]) as step:
        left = None if k % tiles.k == 0 else b.minimum(k - step.index, tiles.k)
        deep = tiles.k if left is None else left
        rows_tile = b.load(x, x_start + step.index, (tiles.m, tiles.k), (groups * k, 1), (live, deep),
                           None if left is None else 0.0)  # fmt: skip
        whole = left is None and isinstance(wide, int)
        valid = None if whole and wide == tiles.n else (wide, deep)
        weights = b.load(weight, w_start + step.index, (tiles.n, tiles.k), (k, 1), valid, None if left is None else 0.0)
        step.next = [b.matmul(rows_tile, b.transpose(weights), step.carried[0])]
    start = first * (groups * n) + group * n + column
    b.store(b.cast(step.results[0], out), y, start, (groups * n, 1), (live, wide))
    grid = [GridAxis(ROWS, tiles.m), fixed(n, tiles.n)]
    return b.finish(grid + ([fixed(groups)] if groups > 1 else []))


def quantise_rows(k: int, limits: DeviceLimits, dtype: str = "float16") -> TileProgram:
    """``x [rows, k]`` to FP8 ``quantised [rows, k]`` and ``scale [rows]`` float32: ``x = quantised . scale``.

    Raises:
        UnsupportedError: the device has no FP8.
    """
    _needs_fp8(limits)
    tile = power_below(limits.unified_buffer * 0.6 / (16 * k), 16)
    b = TileBuilder(program_name("quantise", k, dtype), "MatMul")
    x = b.argument("x", ("rows", k), dtype)
    quantised = b.argument("quantised", ("rows", k), FP8, Role.WRITE)
    scale = b.argument("scale", ("rows",), "float32", Role.WRITE)
    first, live = tile_rows(b, tile)
    values = b.cast(b.load(x, first * k, (tile, k), valid=(live, k)), "float32")
    largest = b.maximum(b.reduce(b.unary("absf", values), 1, "max") * (1 / FP8_LARGEST), 1e-30)
    scaled = values / b.broadcast(largest, (tile, k), 1)
    b.store(b.cast(scaled, FP8), quantised, first * k, valid=(live, k))
    b.store(largest, scale, first, valid=(live,))
    return b.finish([GridAxis(ROWS, tile)])


def linear_fp8(n: int, k: int, limits: DeviceLimits, *, out: str = "float16", rows: int | None = None) -> TileProgram:
    """FP8 ``x [rows, k]``, ``x_scale [rows]`` and FP8 ``weight [n, k]`` with a scale per 128 x 128 to ``[rows, n]``.

    Products of 128 inputs are scaled in float32 and added, so no sum mixes scales.

    Raises:
        UnsupportedError: the device has no FP8, or `k` is no multiple of 128.
    """
    _needs_fp8(limits)
    if k % FP8_BLOCK:
        raise UnsupportedError(f"FP8 product: expected inputs in multiples of {FP8_BLOCK}, found {k}")
    m = 64 if rows is None else min(64, max(16, 1 << (rows - 1).bit_length()))
    b = TileBuilder(program_name("linear_fp8", n, k, out, m), "MatMul", Work.MIXED)
    x, x_scale = b.argument("x", ("rows", k), FP8), b.argument("x_scale", ("rows",), "float32")
    weight = b.argument("weight", (n, k), FP8)
    blocks = k // FP8_BLOCK
    scale = b.argument("weight_scale", (-(-n // FP8_BLOCK), blocks), "float32")
    y = b.argument("y", ("rows", n), out, Role.WRITE)
    first, live = tile_rows(b, m)
    column, wide = tile_columns(b, n, FP8_BLOCK)
    with b.loop(k, FP8_BLOCK, carried=[b.fill(0.0, (m, FP8_BLOCK))]) as step:
        part = b.load(x, first * k + step.index, (m, FP8_BLOCK), (k, 1), (live, FP8_BLOCK))
        weights = b.load(weight, column * k + step.index if not isinstance(column, int) else step.index,
                         (FP8_BLOCK, FP8_BLOCK), (k, 1), (wide, FP8_BLOCK))  # fmt: skip
        block = b.program_id(1) * blocks + step.index // FP8_BLOCK if n > FP8_BLOCK else step.index // FP8_BLOCK
        product = b.matmul(part, b.transpose(weights))
        step.next = [step.carried[0] + product * b.read(scale, block)]
    row_scale = b.broadcast(b.load(x_scale, first, (m,), valid=(live,)), (m, FP8_BLOCK), 1)
    b.store(b.cast(step.results[0] * row_scale, out), y, first * n + column, (n, 1), (live, wide))
    return b.finish([GridAxis(ROWS, m), fixed(n, FP8_BLOCK)])


def _needs_fp8(limits: DeviceLimits) -> None:
    if FP8 not in limits.dtypes:
        raise UnsupportedError(f"{limits.name}: FP8 products: expected a device whose cube multiplies {FP8}")
