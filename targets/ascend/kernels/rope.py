"""Interleaved rotary embedding of trailing dims (V4 paper, section 2.3): angles once per step, then rotations.

Angles are float32 products of position and frequency, as in the reference, up to a million radians. They are brought
into [-pi, pi] by subtracting a multiple of 2 pi in pieces that are exact in float32 (Cody and Waite, Software Manual
for the Elementary Functions, 1980), and sines come from our own polynomial: no device library's accuracy is relied on.
"""

from __future__ import annotations

import math

import numpy as np

from ..emit import TileBuilder, Value
from ..program import DeviceLimits, GridAxis, Role, TileProgram
from ..tiles import power_below
from .common import BATCH, CHUNK, ROWS, fixed, program_name

_PIECE_BITS = 6
"""Significant bits of each piece of 2 pi: with a multiple of at most 18 bits, products are exact in 24."""


def _pieces(value: float, count: int) -> list[float]:
    """`value` as a sum: `count` numbers of few bits, and what is left in float32."""
    pieces = []
    for _ in range(count):
        exponent = math.frexp(value)[1]
        step = 2.0 ** (exponent - _PIECE_BITS)
        pieces.append(math.floor(value / step) * step)
        value -= pieces[-1]
    return [*pieces, float(np.float32(value))]


_TWO_PI = _pieces(2 * math.pi, 4)
_SINE = tuple((-1) ** i / math.factorial(2 * i + 1) for i in range(7))
_COSINE = tuple((-1) ** i / math.factorial(2 * i) for i in range(7))
"""Taylor coefficients of half angles: on [-pi/2, pi/2] the first terms left out are below 7e-10 and 7e-9."""


def cosine_and_sine(b: TileBuilder, angles: Value) -> tuple[Value, Value]:
    """Of float32 angles in ``[0, 2^20]``, to about 3e-7."""
    turns = b.cast(b.cast(angles * (0.5 / math.pi) + 0.5, "int32"), "float32")
    for piece in _TWO_PI:
        angles = angles - turns * piece
    half = angles * 0.5
    square = half * half
    sine, cosine = _polynomial(square, _SINE) * half, _polynomial(square, _COSINE)
    return cosine * cosine - sine * sine, sine * cosine * 2.0


def _polynomial(x: Value, coefficients: tuple[float, ...]) -> Value:
    result = x * coefficients[-1] + coefficients[-2]
    for coefficient in reversed(coefficients[:-2]):
        result = result * x + coefficient
    return result


def rotate(b: TileBuilder, x: Value, cosine: Value, sine: Value) -> Value:
    """``x [n, R]`` float32 in pairs (2i, 2i + 1) by the angles of ``cosine, sine [n, R/2]``."""
    assert x.shape is not None
    rows, width = x.shape
    half = (rows, width // 2)
    even, odd = b.part(x, [0, 0], half, [1, 2]), b.part(x, [0, 1], half, [1, 2])
    turned = b.put(even * cosine - odd * sine, b.empty((rows, width), "float32"), [0, 0], [1, 2])
    return b.put(odd * cosine + even * sine, turned, [0, 1], [1, 2])


def angles_of(b: TileBuilder, first: Value, step: int, count: int, frequencies: Value) -> Value:
    """``[count, R/2]``: positions `first`, ``first + step``, ... times `frequencies` ``[R/2]``, float32."""
    assert frequencies.shape is not None
    shape = (count, frequencies.shape[0])
    position = b.cast(b.iota(count) * step + b.cast(first, "int32"), "float32")
    return b.broadcast(position, shape, 1) * b.broadcast(frequencies, shape, 0)


def rope_angles(dims: int, limits: DeviceLimits, *, cosine: str = "cosine", sine: str = "sine") -> TileProgram:
    """``positions [B]`` int32 and ``inv_freq [R/2]`` to ``cosine`` and ``sine [B, S, R/2]`` float32 of every token.

    Needed once per step and set of frequencies.
    """
    half = dims // 2
    tile = power_below(limits.unified_buffer / (4 * half * 16), 64)
    b = TileBuilder(program_name("rope_angles", dims), "TrailingRope")
    positions = b.argument("positions", ("batch",), "int32")
    inv_freq = b.argument("inv_freq", (half,), "float32")
    outputs = [b.argument(n, ("batch", "chunk", half), "float32", Role.WRITE) for n in (cosine, sine)]
    b.scalar("batch")
    chunk, row = b.scalar("chunk"), b.program_id(0)
    first = b.program_id(1) * tile
    live = b.minimum(chunk - first, tile)
    angles = angles_of(b, b.read(positions, row) + first, 1, tile, b.load(inv_freq, 0, (half,)))
    for value, output in zip(cosine_and_sine(b, angles), outputs, strict=True):
        b.store(value, output, (row * chunk + first) * half, valid=(live, half))
    return b.finish([GridAxis(BATCH), GridAxis(CHUNK, tile)])


def trailing_rope(
    heads: int, width: int, dims: int, sign: float, limits: DeviceLimits, *, dtype: str = "float16",
    out: str | None = None, names: tuple[str, str] = ("x", "y"),
) -> TileProgram:  # fmt: skip
    """``x [rows, H, D]`` with the last R dims rotated by ``cosine``, ``sine [rows, R/2]``; sign -1 rotates back.

    Args:
        heads, width: H and D; one head is rotated several tokens at a time.
        dims: R.
        sign: 1.0 or -1.0.
        limits: of the device.
        dtype: of `x`; computed in float32.
        out: of `y`, `dtype` by default.
        names: of the two buffers.
    """
    out, half = out or dtype, dims // 2
    tile = power_below(limits.unified_buffer / (width * 12 + dims * 40), 64)
    tile = min(tile, heads) if heads > 1 else tile
    while heads > 1 and heads % tile:
        tile //= 2
    b = TileBuilder(program_name("trailing_rope", heads, width, dims, "back" if sign < 0 else "on", dtype, out),
                    "TrailingRope")  # fmt: skip
    x = b.argument(names[0], ("rows", heads, width), dtype)
    tables = [b.argument(n, ("rows", half), "float32") for n in ("cosine", "sine")]
    y = b.argument(names[1], ("rows", heads, width), out, Role.WRITE)
    rows, place = b.scalar("rows"), b.program_id(0)
    if heads > 1:
        start, live = (place * heads + b.program_id(1) * tile) * width, tile
        cosine, sine = (b.broadcast(b.load(t, place * half, (half,)), (tile, half), 0) for t in tables)
    else:
        first = place * tile
        start, live = first * width, b.minimum(rows - first, tile)
        cosine, sine = (b.load(t, first * half, (tile, half), valid=(live, half)) for t in tables)
    valid = None if heads > 1 else (live, width)
    whole = b.load(x, start, (tile, width), valid=valid)
    trailing = b.cast(b.part(whole, [0, width - dims], (tile, dims)), "float32")
    turned = rotate(b, trailing, cosine, sine * sign)
    b.store(b.put(b.cast(turned, out), b.cast(whole, out), [0, width - dims]), y, start, valid=valid)
    grid = [GridAxis(ROWS), fixed(heads, tile)] if heads > 1 else [GridAxis(ROWS, tile)]
    return b.finish(grid)
