"""KV compressor: every complete window of m tokens becomes one row (V4 paper, section 2.3).

The rings of raw projections are laid out as histories, in which the slots of a window are one block of rows (two, where
windows overlap: first halves of the window before, second halves of its own). Pooling goes column by column, so windows
of 128 rows are cut into columns; norm and rotation need whole rows and follow in a program of their own.
"""

from __future__ import annotations

from typing import Any

from ..emit import TileBuilder, Value
from ..program import DeviceLimits, GridAxis, Polynomial, Role, TileProgram
from ..tiles import column_tile, power_below
from .common import BATCH, CHUNK, clamp, fixed, program_name
from .history import history_shape, ring_history, ring_write
from .rope import angles_of, cosine_and_sine, rotate

_NO_WEIGHT = -1e30
"""Gate of a slot before position 0: finite, and its exponential is 0."""


def kv_compress(
    width: int, columns: int, dims: int, ratio: int, eps: float, limits: DeviceLimits, *, dtype: str = "float16",
    projected: str = "float32",
) -> tuple[TileProgram, ...]:  # fmt: skip
    """The programs of KVCompress in the order they run; names and shapes of its inputs and outputs are the op's.

    Args:
        width: Z, of the projections.
        columns: C, of the rows; Z is C, or 2 C where windows overlap.
        dims: R, rotated dims.
        ratio: m.
        eps: of the norm.
        limits: of the device.
        dtype: of ``rows``; rings are float32.
        projected: dtype of ``kv`` and ``gate``.
    """
    size, op = ratio * (width // columns), "KVCompress"
    programs: list[TileProgram] = []
    for name, before in (("kv", 0.0), ("gate", _NO_WEIGHT)):
        programs += ring_history(
            size, width, limits, op=op, ring=f"state_{name}", new=name, history=f"history_{name}",
            ring_dtype="float32", new_dtype=projected, before=before,
        )  # fmt: skip
    programs += [
        _pool(width, columns, ratio, limits, op),
        _place(columns, dims, ratio, eps, limits, dtype, op),
    ]
    for name in ("kv", "gate"):
        programs.append(
            ring_write(size, width, limits, op=op, ring=f"state_{name}", history=f"history_{name}", dtype="float32")
        )
    return tuple(programs)


def _windows(ratio: int) -> Polynomial:
    """At most so many windows does a chunk complete."""
    return CHUNK * Polynomial.of(1 / ratio)


def _pool(width: int, columns: int, ratio: int, limits: DeviceLimits, op: str) -> TileProgram:
    """``history_kv``, ``history_gate`` and ``bias [m, Z]`` to ``pooled [B, windows, C]`` float32."""
    halves = width // columns
    size = halves * ratio
    tile = column_tile(limits, columns, size, live=8)
    b = TileBuilder(program_name("pool_windows", width, columns, ratio), op)
    kv, gate = (b.argument(f"history_{n}", history_shape(size, width), "float32") for n in ("kv", "gate"))
    bias = b.argument("bias", (ratio, width), "float32")
    positions = b.argument("positions", ("batch",), "int32")
    pooled = b.argument("pooled", ("batch", _windows(ratio), columns), "float32", Role.WRITE)
    b.scalar("batch")
    chunk, row, window = b.scalar("chunk"), b.program_id(0), b.program_id(1)
    column, _ = _column(b, columns, tile)
    # The history's first row is of position p - Q, and the window's last token of (w + 1) m - 1. A window that this
    # chunk does not complete reads the last rows instead, and nobody reads its result.
    start = b.minimum((window + 1) * ratio - b.read(positions, row) % ratio, chunk)
    first = row * (chunk + size) + start
    shape = (ratio, tile)
    largest = None
    gates, values = [], []
    for half in range(halves):
        at = (first + half * ratio) * width + (half * columns) + column
        offset = b.binary("add", column, half * columns)
        gates.append(b.load(gate, at, shape, (width, 1)) + b.load(bias, offset, shape, (width, 1)))
        values.append(b.load(kv, at, shape, (width, 1)))
        most = b.reduce(gates[-1], 0, "max")
        largest = most if largest is None else b.maximum(largest, most)
    assert largest is not None
    total: Any = None
    summed: Any = None
    for gated, value in zip(gates, values, strict=True):
        share = b.unary("exp", gated - b.broadcast(largest, shape, 0))
        part, weighted = b.reduce(share, 0), b.reduce(share * value, 0)
        total, summed = (part, weighted) if total is None else (total + part, summed + weighted)
    place = (row * _ceiling(b, chunk, ratio) + window) * columns + column
    b.store(summed / total, pooled, place)
    return b.finish([GridAxis(BATCH), GridAxis(CHUNK, ratio), fixed(columns, tile)])


def _ceiling(b: TileBuilder, x: Value, divisor: int) -> Value:
    return (x + (divisor - 1)) // divisor


def _column(b: TileBuilder, width: int, tile: int) -> tuple[Any, int]:
    return (b.program_id(2) * tile if tile < width else 0), tile


def _place(columns: int, dims: int, ratio: int, eps: float, limits: DeviceLimits, dtype: str, op: str) -> TileProgram:
    """``pooled [B, windows, C]`` normed by ``norm [C]``, rotated at each window's first position, into ``rows``."""
    tile = power_below(limits.unified_buffer * 0.8 / (columns * 4 * 6 + dims * 4 * 16), 16)
    b = TileBuilder(program_name("place_rows", columns, dims, ratio, dtype), op)
    pooled = b.argument("pooled", ("batch", _windows(ratio), columns), "float32")
    norm = b.argument("norm", (columns,), "float32")
    inv_freq = b.argument("inv_freq", (dims // 2,), "float32")
    positions, lengths = (b.argument(n, ("batch",), "int32") for n in ("positions", "lengths"))
    rows = b.argument("rows", ("batch", "capacity", columns), dtype, Role.UPDATE)
    b.scalar("batch")
    chunk, capacity, row = b.scalar("chunk"), b.scalar("capacity"), b.program_id(0)
    first = b.program_id(1) * tile
    position = b.read(positions, row)
    begun = position // ratio
    complete = (position + b.read(lengths, row)) // ratio - begun
    live = clamp(b, complete - first, 0, tile)
    shape = (tile, columns)
    start = (row * _ceiling(b, chunk, ratio) + first) * columns
    values = b.load(pooled, start, shape, valid=(live, columns), fill=0.0)
    root = b.unary("rsqrt", b.reduce(values * values, 1) * (1 / columns) + eps)
    normed = values * b.broadcast(root, shape, 1) * b.broadcast(b.load(norm, 0, (columns,)), shape, 0)
    angles = angles_of(b, (begun + first) * ratio, ratio, tile, b.load(inv_freq, 0, (dims // 2,)))
    cosine, sine = cosine_and_sine(b, angles)
    trailing = rotate(b, b.part(normed, [0, columns - dims], (tile, dims)), cosine, sine)
    turned = b.put(trailing, normed, [0, columns - dims])
    target = (row * capacity + begun + first) * columns
    b.store(b.cast(turned, dtype), rows, target, valid=(live, columns))
    # One tile more than the windows need would do nothing: its rows are not live.
    return b.finish([GridAxis(BATCH), GridAxis(_windows(ratio), tile)])
