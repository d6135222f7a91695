"""Products with quantised weights: rows are quantised as well, once per kernel, and multiplied as 8-bit integers.

A row is cut into the groups of `quant_packing`; a group of it is ``scale * code`` with signed 8-bit codes. Sums over a
group are exact 32-bit integers, sums over groups float32::

    y = sum over groups of weight_scale * row_scale * sum over the group of (stored - OFFSET) * code

FP4 weights are twice their value, which is an integer, times half their scale. `stored` is unsigned, as ``vpdpbusd``
wants it, so the integer sum starts at ``-OFFSET * sum(code)`` of the group, which
is worked out when the row is quantised. Without that instruction the same integers are summed in plain arithmetic.
"""

# mypy: ignore-errors
# (TVMScript: the macros below are parsed by TVM, not run by Python.)

from __future__ import annotations

from typing import Any, NamedTuple

from tvm.script import tirx as T

from ...quantisation import GROUP, OFFSET, QUANTISED, groups
from .common import VECTOR, sum_lanes
from .native_packing import BLOCK_BYTES as NATIVE_BLOCK_BYTES
from .native_packing import SCALE_BYTES as NATIVE_SCALE_BYTES
from .packing import PANEL
from .quant_packing import SCALE_BYTES, block_bytes

VECTORS = PANEL // VECTOR
"""Vectors of sums per row of a panel."""

LINE = 64
"""Bytes of a cache line; `LINE` and vectors of `VECTOR` words are the same size."""

INPUTS = 4
"""Inputs whose products one instruction sums up, of `VECTOR` outputs."""

AHEAD_BYTES = 9 << 10
"""How far ahead of its use a panel is fetched from memory.

The hardware's own fetching stops at page boundaries, and a block of rows computes too long on a group for the processor
to reach the next page by itself. Measured on 4096 x 4096: twice as fast for 8 rows, a quarter faster for one row of
4 bits; one row of 8 bits is read at the memory's speed without, and panels in the cache are better left alone.
"""

_ROUND = 12582912.0
"""1.5 * 2**23: added to a float32 of up to 2**22, it leaves the nearest integer (ties to even) in the low bits."""
_ROUND_BITS = 0x4B400000


class StoredBlocks(NamedTuple):
    """What a block of 32 inputs of a panel holds.

    Attributes:
        dtype: ``int8``, ``int4`` or ``fp4``.
        nibbles: whether two codes share a byte.
        offset: what is added to a weight, in units of its scale, to make it unsigned.
        scale_bytes: what stands before the codes.
        nbytes: of the whole block.
    """

    dtype: str
    nibbles: bool
    offset: int
    scale_bytes: int
    nbytes: int

    @classmethod
    def of(cls, dtype: str) -> StoredBlocks:
        """By the name of the storage dtype."""
        if dtype == "fp4":
            return cls(dtype, True, max(_DOUBLED_E2M1), NATIVE_SCALE_BYTES[dtype], NATIVE_BLOCK_BYTES[dtype])
        bits = QUANTISED[dtype]
        return cls(dtype, bits == 4, OFFSET[bits], SCALE_BYTES, block_bytes(bits))


_DOUBLED_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Twice the value of every E2M1 code: integers, so that sums over a group are exact."""


class QuantisedRows(NamedTuple):
    """Rows as `quant_panel_product` reads them; buffers of the kernel.

    Attributes:
        codes: ``[rows, G * GROUP]`` int8 in [-127, 127].
        scales: ``[rows, G]`` float32.
        starts: ``[rows, G]`` int32, what the sum over a group starts at: ``-OFFSET * sum(codes)``.
    """

    codes: Any
    scales: Any
    starts: Any


def quantised_rows(rows: Any, k: int) -> QuantisedRows:
    """Memory for `rows` rows of `k` inputs."""
    count = T.int64(groups(k))
    return QuantisedRows(
        T.alloc_buffer((rows, count * GROUP), "int8"),
        T.alloc_buffer((rows, count), "float32"),
        T.alloc_buffer((rows, count), "int32"),
    )


@T.macro
def quantise_group(values, quantised, row, g, offset):
    """Quantise group `g` of a row, given as local ``[VECTORS, VECTOR]`` float32."""
    largest = T.alloc_buffer((1, VECTOR), "float32", scope="local")
    total = T.alloc_buffer((1, VECTOR), "int32", scope="local")
    code = T.alloc_buffer((VECTORS, VECTOR), "int32", scope="local")
    for v in T.vectorized(VECTOR):
        largest[0, v] = T.max(T.abs(values[0, v]), T.abs(values[1, v]))
    for v in T.vectorized(8):
        largest[0, v] = T.max(largest[0, v], largest[0, v + 8])
    for v in T.vectorized(4):
        largest[0, v] = T.max(largest[0, v], largest[0, v + 4])
    for v in T.vectorized(2):
        largest[0, v] = T.max(largest[0, v], largest[0, v + 2])
    scale: T.float32 = T.max(largest[0, 0], largest[0, 1]) / T.float32(127)
    # Below the smallest normal float32 the reciprocal could overflow: such a group is zero.
    inverse: T.float32 = T.if_then_else(scale < T.float32(1.2e-38), T.float32(0), T.float32(1) / scale)
    quantised.scales[row, g] = scale
    for c in T.unroll(VECTORS):
        for v in T.vectorized(VECTOR):
            code[c, v] = T.reinterpret("int32", values[c, v] * inverse + T.float32(_ROUND)) - T.int32(_ROUND_BITS)
        for v in T.vectorized(VECTOR):
            quantised.codes[row, g * GROUP + c * VECTOR + v] = T.cast(code[c, v], "int8")
    for v in T.vectorized(VECTOR):
        total[0, v] = code[0, v] + code[1, v]
    sum_lanes(total, 0, VECTOR)
    quantised.starts[row, g] = T.int32(-offset) * total[0, 0]


@T.macro
def quantise_row(x, quantised, row, k, offset):
    """Quantise row `row`: ``scale = max|x| / 127`` per group, ``code = round(x / scale)``, ties to even.

    Args:
        x: ``[rows, >= k]`` float32.
        quantised: `QuantisedRows`, written.
        k, offset: static; missing inputs of the last group count as zero.
    """
    for g in range(T.int64(k // GROUP)):
        lanes = T.alloc_buffer((VECTORS, VECTOR), "float32", scope="local")
        for c in T.unroll(VECTORS):
            for v in T.vectorized(VECTOR):
                lanes[c, v] = x[row, g * GROUP + c * VECTOR + v]
        quantise_group(lanes, quantised, row, g, offset)
    if k % GROUP > 0:
        rest = T.alloc_buffer((VECTORS, VECTOR), "float32", scope="local")
        for c in T.unroll(VECTORS):
            for v in T.vectorized(VECTOR):
                rest[c, v] = T.float32(0)
        for i in range(T.int64(k % GROUP)):
            rest[i // VECTOR, i % VECTOR] = x[row, k // GROUP * GROUP + i]
        quantise_group(rest, quantised, row, T.int64(k // GROUP), offset)


def _sum_of_products(sums: Any, weights: Any, inputs: Any, vnni: bool) -> Any:
    """``sums + `` the products of four bytes each: unsigned ones of `weights`, signed ones of `inputs`.

    Args:
        sums: int32x16.
        weights: int32x16 of four bytes each.
        inputs: int32 of four bytes, the same for all lanes.
    """
    if vnni:
        # The operands are 64 bytes since LLVM 22, 16 integers before.
        stored, codes = (T.reinterpret("int8x64", a) for a in (weights, T.Broadcast(inputs, VECTOR)))
        return T.call_llvm_pure_intrin("int32x16", "llvm.x86.avx512.vpdpbusd.512", sums, stored, codes)
    for i in range(INPUTS):
        weight = T.bitwise_and(T.shift_right(weights, _lanes(8 * i)), _lanes(0xFF))
        code = T.shift_right(T.shift_left(inputs, T.int32(24 - 8 * i)), T.int32(24))
        sums = sums + weight * T.Broadcast(code, VECTOR)
    return sums


def _lanes(value: int) -> Any:
    """A vector of one integer."""
    return T.Broadcast(T.int32(value), VECTOR)


def _weights(weight: Any, panel: Any, g: Any, step: int, c: int, stored: StoredBlocks, vnni: bool) -> Any:
    """Four weights of each output of vector `c`, unsigned, as int32x16."""
    if not stored.nibbles:
        at = stored.scale_bytes + (step * VECTORS + c) * 4 * VECTOR
        return T.reinterpret("int32x16", weight[panel, g, T.Ramp(at, 1, 4 * VECTOR)])
    at = stored.scale_bytes + step * 4 * VECTOR
    both = T.reinterpret("int32x16", weight[panel, g, T.Ramp(at, 1, 4 * VECTOR)])
    codes = T.bitwise_and(T.shift_right(both, _lanes(4 * c)), _lanes(0x0F0F0F0F))
    return _unsigned_e2m1(codes, stored.offset, vnni) if stored.dtype == "fp4" else codes


def _unsigned_e2m1(codes: Any, offset: int, vnni: bool) -> Any:
    """``offset + `` twice the value of the E2M1 code in every byte of an int32x16."""
    if vnni:
        table = [v + offset for v in _DOUBLED_E2M1]
        words = [int.from_bytes(bytes(table[i : i + 4]), "little") for i in (0, 4, 8, 12)] * 4
        lookup = T.Shuffle([T.int32(w) for w in words], list(range(VECTOR)))
        found = T.call_llvm_pure_intrin(
            "int8x64", "llvm.x86.avx512.pshuf.b.512", T.reinterpret("int8x64", lookup), T.reinterpret("int8x64", codes)
        )
        return T.reinterpret("int32x16", found)

    def bit(n: int) -> Any:
        return T.bitwise_and(T.shift_right(codes, _lanes(n)), _lanes(0x01010101))

    # Magnitudes 0-4 are their own codes; above, the low two bits count once more, and twice more where both are set.
    low = T.bitwise_and(codes, bit(2) * _lanes(3))
    both = T.bitwise_and(T.bitwise_and(bit(2), bit(1)), bit(0))
    magnitude = T.bitwise_and(codes, _lanes(0x07070707)) + low + both * _lanes(2)
    negative = T.bitwise_and(magnitude, bit(3) * _lanes(0xFF))
    return _lanes(offset * 0x01010101) + magnitude - negative * _lanes(2)


def _scales(weight: Any, panel: Any, g: Any, c: int, form: StoredBlocks, vnni: bool) -> Any:
    """What the sums of vector `c` are multiplied with, as float32x16."""
    if form.dtype == "fp4":
        exponents = T.cast(weight[panel, g, T.Ramp(VECTOR * c, 1, VECTOR)], "int32x16")
        return T.reinterpret("float32x16", T.shift_left(exponents, _lanes(23))) * T.Broadcast(T.float32(0.5), VECTOR)
    stored = weight[panel, g, T.Ramp(2 * VECTOR * c, 1, 2 * VECTOR)]
    if vnni:
        return T.cast(T.reinterpret("float16x16", stored), "float32x16")
    # Not every CPU converts float16: exponent and mantissa are moved into place, and the exponent's bias corrected.
    bits = T.cast(T.reinterpret("uint16x16", stored), "int32x16")
    sign = T.shift_left(T.bitwise_and(bits, _lanes(0x8000)), _lanes(16))
    magnitude = T.shift_left(T.bitwise_and(bits, _lanes(0x7FFF)), _lanes(13))
    return T.reinterpret("float32x16", T.bitwise_or(sign, magnitude)) * T.Broadcast(T.float32(2.0**112), VECTOR)


@T.macro
def _fetch(weight, panel, g, stored):
    """Ask for the group `AHEAD_BYTES` after group `g`; behind the panel's last comes the next panel."""
    at: T.int64 = T.min(
        panel * weight.shape[1] + g + AHEAD_BYTES // stored.nbytes, weight.shape[0] * weight.shape[1] - 1
    )
    for line in T.unroll(-(-stored.nbytes // LINE)):
        # For reading (0), to be kept in all caches (3), data (1); the index counts groups from the first panel on.
        T.evaluate(T.call_intrin("void", "tirx.prefetch", T.address_of(weight[0, at, line * LINE]), 0, 3, 1))


def _dots(rows: int) -> list[Any]:
    """Memory for the sums over a group, per vector of outputs: TVM puts only buffers under 1 KiB on the stack."""
    return [T.alloc_buffer((rows, VECTOR), "int32") for _ in range(VECTORS)]


@T.macro
def quant_panel_product(sums, x, row_at, weight, panel, start, stop, rows, cold, stored, vnni):
    """``sums[r, :] =`` the sum over the groups from `start` to `stop` of row ``row_at[r]`` times panel `panel`.

    Args:
        sums: local ``[rows * VECTORS, VECTOR]`` float32; vector c of row r ends up at ``r * VECTORS + c``.
        x: `QuantisedRows`.
        row_at: local ``[rows]`` int64, rows of `x`.
        weight: ``[panels, groups, block]`` uint8 from `quant_pack_rows` or, of FP4, `native_pack_rows`.
        cold: whether the panel is still in memory, and in no cache.
        rows, stored, vnni: static; `stored` says what a block holds.
    """
    for a in T.unroll(rows * VECTORS):
        for v in T.vectorized(VECTOR):
            sums[a, v] = T.float32(0)
    dots = _dots(rows)

    @T.inline
    def begin(c, r, g):
        dots[c][r, T.Ramp(0, 1, VECTOR)] = T.Broadcast(x.starts[row_at[r], g], VECTOR)

    @T.inline
    def multiply(c, r, g, step):
        dots[c][r, T.Ramp(0, 1, VECTOR)] = _sum_of_products(
            dots[c][r, T.Ramp(0, 1, VECTOR)],
            _weights(weight, panel, g, step, c, stored, vnni),
            T.reinterpret("int32", x.codes[row_at[r], T.Ramp(g * GROUP + step * INPUTS, 1, INPUTS)]),
            vnni,
        )

    @T.inline
    def end(c, r, g):
        sums[r * VECTORS + c, T.Ramp(0, 1, VECTOR)] = sums[r * VECTORS + c, T.Ramp(0, 1, VECTOR)] + T.cast(
            dots[c][r, T.Ramp(0, 1, VECTOR)], "float32x16"
        ) * (_scales(weight, panel, g, c, stored, vnni) * T.Broadcast(x.scales[row_at[r], g], VECTOR))

    @T.inline
    def reduce(fetch):
        for g in range(start, stop):
            if fetch:
                _fetch(weight, panel, g, stored)
            for r in T.unroll(rows):
                begin(0, r, g)
                begin(1, r, g)
            if vnni:
                for step in T.unroll(GROUP // INPUTS):
                    for r in T.unroll(rows):
                        multiply(0, r, g, step)
                        multiply(1, r, g, step)
            else:
                for step in range(T.int64(GROUP // INPUTS)):
                    for r in T.unroll(rows):
                        multiply(0, r, g, step)
                        multiply(1, r, g, step)
            for r in T.unroll(rows):
                end(0, r, g)
                end(1, r, g)

    # Two loops: the mere question in one of them keeps LLVM from holding all sums of 8 rows in registers.
    if rows > 1 or stored.nibbles:
        if cold:
            reduce(True)
        else:
            reduce(False)
    else:
        reduce(False)
