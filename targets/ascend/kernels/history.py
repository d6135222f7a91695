"""Rings of the last rows as plain sequences, and back: what attention, compressor and Engram read and write.

``history [B, Q + S, Z]`` holds the Q rows before the chunk, oldest first, then the chunk: what stands ``d`` tokens
before token j lies at row ``Q + j - d``, whatever the position, so programs behind these three load plain blocks. Rows
of positions below 0 hold a number of the caller's choice. The ring is read before it is written, as the ops demand.
"""

from __future__ import annotations

from ..emit import TileBuilder
from ..program import DeviceLimits, GridAxis, Polynomial, Role, TileProgram
from ..tiles import column_tile, power_below
from .common import BATCH, CHUNK, fixed, program_name, tile_columns


def history_shape(size: int, width: int) -> tuple[int | str | Polynomial, ...]:
    """``[B, Q + S, Z]``."""
    return "batch", CHUNK + Polynomial.of(size), width


def ring_history(
    size: int, width: int, limits: DeviceLimits, *, op: str, ring: str, new: str, history: str, ring_dtype: str,
    new_dtype: str, before: float = 0.0,
) -> tuple[TileProgram, TileProgram]:  # fmt: skip
    """Programs that lay out ``ring [B, Q, Z]`` and ``new [B, S, Z]`` as ``history [B, Q + S, Z]`` of the ring's dtype.

    Args:
        size, width: Q and Z.
        limits: of the device.
        op: the op of the model.
        ring, new, history: names of the buffers.
        ring_dtype, new_dtype: of the ring and of the chunk's rows.
        before: what rows of positions below 0 hold.
    """
    return (
        _unroll(size, width, limits, op, ring, history, ring_dtype, before),
        _append(size, width, limits, op, new, history, new_dtype, ring_dtype),
    )


def _unroll(
    size: int, width: int, limits: DeviceLimits, op: str, ring: str, history: str, dtype: str, before: float
) -> TileProgram:
    columns = column_tile(limits, width, size, live=2)
    b = TileBuilder(program_name(f"unroll_{ring}", size, width, dtype), op)
    source = b.argument(ring, ("batch", size, width), dtype)
    positions = b.argument("positions", ("batch",), "int32")
    target = b.argument(history, history_shape(size, width), dtype, Role.WRITE)
    b.scalar("batch")
    chunk, row = b.scalar("chunk"), b.program_id(0)
    column, wide = tile_columns(b, width, columns)
    position = b.read(positions, row)
    slot = position % size
    # The ring from the oldest row's slot to its end, unless nothing was ever written there, then from its start. Two
    # tiles: of two copies into a filled one, bishengir 1.2.0 wipes the first out with the fill.
    older = b.minimum(position // size, 1) * (size - slot)
    start, shape, stride = row * (size * width) + column, (size, columns), (width, 1)
    target_start = row * (chunk + size) * width + column
    oldest = b.load(source, start + slot * width, shape, stride, (older, wide), before)
    b.store(oldest, target, target_start, stride, (size - slot, wide))
    newest = b.load(source, start, shape, stride, (slot, wide))
    b.store(newest, target, target_start + (size - slot) * width, stride, (slot, wide))
    return b.finish([GridAxis(BATCH), fixed(width, columns)])


def _append(
    size: int, width: int, limits: DeviceLimits, op: str, new: str, history: str, dtype: str, out: str
) -> TileProgram:
    columns = column_tile(limits, width, 8, live=4)
    tile = power_below(limits.unified_buffer * 0.8 / (columns * 4 * 4), 64)
    b = TileBuilder(program_name(f"append_{new}", size, width, dtype, out), op)
    source = b.argument(new, ("batch", "chunk", width), dtype)
    target = b.argument(history, history_shape(size, width), out, Role.UPDATE)
    b.scalar("batch")
    chunk, row = b.scalar("chunk"), b.program_id(0)
    first = b.program_id(1) * tile
    live = b.minimum(chunk - first, tile)
    column, wide = tile_columns(b, width, columns, axis=2)
    rows = b.load(source, (row * chunk + first) * width + column, (tile, columns), (width, 1), (live, wide))
    place = (row * (chunk + size) + first + size) * width + column
    b.store(b.cast(rows, out), target, place, (width, 1), (live, wide))
    return b.finish([GridAxis(BATCH), GridAxis(CHUNK, tile), fixed(width, columns)])


def ring_write(
    size: int, width: int, limits: DeviceLimits, *, op: str, ring: str, history: str, dtype: str
) -> TileProgram:
    """The last Q live rows of ``history [B, Q + S, Z]`` into ``ring [B, Q, Z]``, slot = position mod Q.

    Rows of padding tokens are not written; a sequence of no live tokens keeps its ring.
    """
    columns = column_tile(limits, width, size, live=1.5)
    b = TileBuilder(program_name(f"write_{ring}", size, width, dtype), op)
    source = b.argument(history, history_shape(size, width), dtype)
    positions, lengths = (b.argument(n, ("batch",), "int32") for n in ("positions", "lengths"))
    target = b.argument(ring, ("batch", size, width), dtype, Role.UPDATE)
    b.scalar("batch")
    chunk, row = b.scalar("chunk"), b.program_id(0)
    column, wide = tile_columns(b, width, columns)
    length = b.read(lengths, row)
    count = b.minimum(length, size)
    slot = (b.read(positions, row) + length - count) % size
    upper = b.minimum(count, size - slot)
    start = (row * (chunk + size) + length + size - count) * width + column
    rows = b.load(source, start, (size, columns), (width, 1), (count, wide))
    base = row * (size * width) + column
    for begin, first, many in ((0, slot, upper), (upper, 0, count - upper)):
        b.store(rows, target, base + first * width, (width, 1), (many, wide), start=[begin, 0])
    return b.finish([GridAxis(BATCH), fixed(width, columns)])
