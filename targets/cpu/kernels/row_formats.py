"""How the rows of caches are stored: floats as they are, or the narrow rows of deployments, decoded in registers.

A format says what a row looks like in memory and reads and writes one. Narrow rows are those of published deployments
(V4 paper, section 2.3; number formats of the OCP Microscaling specification v1.0)::

    fp8   head_dim - rope_dims E4M3 codes | rope_dims bfloat16, little-endian | E8M0 scales, padded to a multiple of 8
    fp4   ceil(width / 2) bytes of two E2M1 codes, the even dim in the low bits | an E8M0 scale per 32 dims

FP8 scales are of 64 dims each, the last group of what is left. A scale is the smallest power of two with which no
element exceeds the largest code, at least 2**-100; elements are rounded to nearest, ties to even. Writing what was read
gives the same values again. Where an element is no finite number, neither is any of its group when read.
"""

# mypy: ignore-errors
# (TVMScript: the macros below are parsed by TVM, not run by Python.)

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from v4c.errors import UnsupportedError

from .common import vector_width

FP8_GROUP = 64
"""Dims that share a scale in an FP8 row."""
FP8_PADDING = 8
"""The scales of an FP8 row are filled up to a multiple of this."""
FP4_GROUP = 32
"""Dims that share a scale in an FP4 row."""

_SMALLEST_SCALE = 127 - 100
"""E8M0 code of the smallest scale that is written."""
_INFINITY = 0x7F800000
_NAN_SCALE = 255


def fp8_bytes(width: int, rope_dims: int) -> int:
    """Bytes of an FP8 row of `width` dims, of which the last `rope_dims` are rotated."""
    plain = width - rope_dims
    return plain + 2 * rope_dims + -(-plain // (FP8_GROUP * FP8_PADDING)) * FP8_PADDING


def fp4_bytes(width: int) -> int:
    """Bytes of an FP4 row."""
    return -(-width // 2) + -(-width // FP4_GROUP)


def row_format(width: int, columns: int, dtype: str) -> str:
    """The name by which `cache_rows` knows the format of rows of `width` dims.

    Args:
        width: dims of a row.
        columns: last dimension of the cache.
        dtype: of the cache; ``uint8`` holds FP8 or FP4 rows.

    Raises:
        UnsupportedError: no format has such rows, or the number of rotated dims cannot be told from them.
    """
    if dtype != "uint8":
        return dtype
    if columns == fp4_bytes(width):
        return "fp4"
    found = [rope for rope in range(0, width, 2) if fp8_bytes(width, rope) == columns]
    if len(found) != 1:
        raise UnsupportedError(
            f"cache rows of {width} dims in {columns} bytes: expected one layout, found {len(found)}"
        )
    return f"fp8:{found[0]}"


def _bits(value: Any) -> Any:
    """The bits of a float32 expression as int32."""
    return T.reinterpret("int32", value)


def _float(bits: Any) -> Any:
    """The float32 of an int32 expression's bits."""
    return T.reinterpret("float32", bits)


def _small_integer(value: Any) -> Any:
    """A float32 expression from 0 to 2**22 rounded to an integer, ties to even."""
    return _bits(value + T.float32(2.0**23)) - T.int32(0x4B000000)


def _code(value: Any, mantissa_bits: int, bias: int, sign_at: int) -> Any:
    """A float32 expression as a code of a minifloat whose largest magnitude it does not exceed, as int32."""
    magnitude = T.bitwise_and(_bits(value), T.int32(0x7FFFFFFF))
    shift = 23 - mantissa_bits
    odd = T.bitwise_and(T.shift_right(magnitude, T.int32(shift)), T.int32(1))
    normal = T.shift_right(magnitude + T.int32((1 << (shift - 1)) - 1) + odd, T.int32(shift))
    normal = normal - T.int32((127 - bias) << mantissa_bits)
    subnormal = _small_integer(T.abs(value) * T.float32(2.0 ** (bias - 1 + mantissa_bits)))
    code = T.Select(magnitude < T.int32((127 - bias + 1) << 23), subnormal, normal)
    sign = T.bitwise_and(T.shift_right(_bits(value), T.int32(31 - sign_at)), T.int32(1 << sign_at))
    return T.bitwise_or(code, sign)


def e4m3_code(value: Any) -> Any:
    """E4M3 code of a float32 expression in [-448, 448], as int32."""
    return _code(value, 3, 7, 7)


def e2m1_code(value: Any) -> Any:
    """E2M1 code of a float32 expression in [-6, 6], as int32."""
    return _code(value, 1, 1, 3)


def e4m3_value(code: Any) -> Any:
    """Value of an E4M3 code, an integer expression, as float32: exponent and mantissa moved into place."""
    code = T.cast(code, "int32")
    sign = T.shift_left(T.bitwise_and(code, T.int32(0x80)), T.int32(24))
    magnitude = T.shift_left(T.bitwise_and(code, T.int32(0x7F)), T.int32(20))
    return _float(T.bitwise_or(sign, magnitude)) * T.float32(2.0**120)


def e2m1_value(code: Any) -> Any:
    """Value of an E2M1 code, the low four bits of an int32 expression, as float32."""
    magnitude = T.bitwise_and(code, T.int32(7))
    normal = T.shift_left(magnitude, T.int32(22)) + T.int32(126 << 23)
    value = T.Select(magnitude < T.int32(2), magnitude * T.int32(0x3F000000), normal)
    return _float(T.bitwise_or(value, T.shift_left(T.bitwise_and(code, T.int32(8)), T.int32(28))))


def scale_value(code: Any) -> Any:
    """Value of an E8M0 code from 1 to 254; infinity for that of NaN."""
    return _float(T.shift_left(T.cast(code, "int32"), T.int32(23)))


def bfloat16_bits(value: Any) -> Any:
    """The bits of a float32 expression as a bfloat16, ties to even, in the low half of an int32."""
    bits = _bits(value)
    odd = T.bitwise_and(T.shift_right(bits, T.int32(16)), T.int32(1))
    rounded = T.shift_right(bits + T.int32(0x7FFF) + odd, T.int32(16))
    nan = T.bitwise_and(bits, T.int32(0x7FFFFFFF)) > T.int32(_INFINITY)
    return T.bitwise_and(T.Select(nan, T.int32(0x7FC0), rounded), T.int32(0xFFFF))


@T.macro
def _group_scale(code, line, r, first, count, lanes, largest_exponent, carry):
    """``code[0]`` = the E8M0 code of the scale of ``line[r, first : first + count]``.

    Args:
        code: ``[1]`` int32, written.
        largest_exponent, carry: static; of the largest value of the elements' format: its exponent, and what makes a
            larger mantissa run over when it is added to the bits.
    """
    largest = T.alloc_buffer((lanes,), "int32")
    for v in T.vectorized(lanes):
        largest[v] = T.int32(0)
    for c in range(T.int64(count // lanes)):
        for v in T.vectorized(lanes):
            largest[v] = T.max(
                largest[v], T.bitwise_and(_bits(line[r, first + c * T.int64(lanes) + v]), T.int32(0x7FFFFFFF))
            )
    top: T.int32 = T.int32(0)
    for v in range(T.int64(lanes)):
        top = T.max(top, largest[v])
    code[0] = T.Select(
        top >= T.int32(_INFINITY),
        T.int32(_NAN_SCALE),
        T.max(T.shift_right(top + T.int32(carry), T.int32(23)) - T.int32(largest_exponent), T.int32(_SMALLEST_SCALE)),
    )


class FloatRows:
    """Rows of `width` float32 or bfloat16 numbers.

    Attributes:
        dtype, columns: dtype and last dimension of the cache.
        narrow: whether reading and writing convert.
        read: macro ``(line, r, source, i, at)``: ``line[r, :] = source[i, at]``, of any floats.
        write: macro ``(target, i, at, line, r)``: ``target[i, at] = line[r, :]``, of float32.
        scratch_dtype: dtype of rows of this format in a kernel's own memory, which `read` and `write` take as well.
        copy: macro ``(target, i, at, own, j)``: ``target[i, at] = own[i, j]``, own being such memory.
    """

    def __init__(self, width: int, dtype: str) -> None:
        self.width = self.columns = width
        self.dtype, self.narrow = dtype, dtype != "float32"
        # TVM keeps what a kernel allocates as bfloat16 in float32, unrounded: scratch rows are bits.
        self.scratch_dtype = "uint16" if self.narrow else dtype

        @T.macro
        def read(line, r, source, i, at):
            for c in range(T.int64(width)):
                if source.dtype == "uint16":
                    line[r, c] = _float(T.shift_left(T.cast(source[i, at, c], "int32"), T.int32(16)))
                else:
                    line[r, c] = T.cast(source[i, at, c], "float32")

        @T.macro
        def write(target, i, at, line, r):
            for c in range(T.int64(width)):
                if target.dtype == "uint16":
                    target[i, at, c] = T.cast(bfloat16_bits(line[r, c]), "uint16")
                elif self.narrow:
                    target[i, at, c] = T.reinterpret(dtype, T.cast(bfloat16_bits(line[r, c]), "uint16"))
                else:
                    target[i, at, c] = line[r, c]

        @T.macro
        def copy(target, i, at, own, j):
            for c in range(T.int64(width)):
                if target.dtype == own.dtype:
                    target[i, at, c] = own[i, j, c]
                else:
                    target[i, at, c] = T.reinterpret(dtype, own[i, j, c])

        self.read, self.write, self.copy = read, write, copy


def _copier(columns: int) -> Any:
    """`FloatRows.copy` for rows of bytes."""

    @T.macro
    def copy(target, i, at, own, j):
        for c in range(T.int64(columns)):
            target[i, at, c] = own[i, j, c]

    return copy


class FP8Rows:
    """FP8 rows of `width` dims, the last `rope_dims` of them in bfloat16; attributes as of `FloatRows`."""

    def __init__(self, width: int, rope_dims: int) -> None:
        self.width, self.columns = width, fp8_bytes(width, rope_dims)
        self.dtype = self.scratch_dtype = "uint8"
        self.narrow = True
        plain = width - rope_dims
        scales = plain + 2 * rope_dims
        groups = [(first, min(FP8_GROUP, plain - first)) for first in range(0, plain, FP8_GROUP)]
        padding = self.columns - scales - len(groups)

        @T.macro
        def read_group(line, r, source, i, at, g, first, count):
            lanes = T.meta_var(vector_width(count))
            scale: T.float32 = scale_value(source[i, at, scales + g])
            for c in range(T.int64(count // lanes)):
                for v in T.vectorized(lanes):
                    line[r, first + c * T.int64(lanes) + v] = (
                        e4m3_value(source[i, at, first + c * T.int64(lanes) + v]) * scale
                    )

        @T.macro
        def write_group(target, i, at, line, r, g, first, count):
            lanes = T.meta_var(vector_width(count))
            code = T.alloc_buffer((1,), "int32")
            _group_scale(code, line, r, T.int64(first), count, lanes, 8, 0x1FFFFF)
            target[i, at, scales + g] = T.cast(code[0], "uint8")
            inverse: T.float32 = _float(T.shift_left(T.int32(254) - code[0], T.int32(23)))
            for c in range(T.int64(count // lanes)):
                for v in T.vectorized(lanes):
                    target[i, at, first + c * T.int64(lanes) + v] = T.cast(
                        e4m3_code(line[r, first + c * T.int64(lanes) + v] * inverse), "uint8"
                    )

        def each_group(body, *arguments):
            """``body(*arguments, g, first, count)`` for every group: there are few, and the last may be smaller."""
            for g, (first, count) in enumerate(groups):
                body(*arguments, g, first, count)

        @T.macro
        def read(line, r, source, i, at):
            each_group(read_group, line, r, source, i, at)
            for d in range(T.int64(rope_dims)):
                line[r, plain + d] = _float(
                    T.bitwise_or(
                        T.shift_left(T.cast(source[i, at, plain + T.int64(2) * d + T.int64(1)], "int32"), T.int32(24)),
                        T.shift_left(T.cast(source[i, at, plain + T.int64(2) * d], "int32"), T.int32(16)),
                    )
                )

        @T.macro
        def write(target, i, at, line, r):
            each_group(write_group, target, i, at, line, r)
            for d in range(T.int64(rope_dims)):
                bits: T.int32 = bfloat16_bits(line[r, plain + d])
                target[i, at, plain + T.int64(2) * d] = T.cast(T.bitwise_and(bits, T.int32(0xFF)), "uint8")
                target[i, at, plain + T.int64(2) * d + T.int64(1)] = T.cast(T.shift_right(bits, T.int32(8)), "uint8")
            for p in range(T.int64(padding)):
                target[i, at, scales + len(groups) + p] = T.uint8(0)

        self.read, self.write, self.copy = read, write, _copier(self.columns)


class FP4Rows:
    """FP4 rows of `width` dims, an even number; attributes as of `FloatRows`.

    But `read` gives even dims first, then odd ones, as a byte's two codes are taken apart: dim d lies at
    ``d // 2 + d % 2 * (width // 2)``.
    """

    def __init__(self, width: int) -> None:
        if width % 2:
            raise UnsupportedError(f"FP4 rows: expected an even number of dims, found {width}")
        self.width, self.columns = width, fp4_bytes(width)
        self.dtype = self.scratch_dtype = "uint8"
        self.narrow = True
        half = width // 2
        groups = [(first, min(FP4_GROUP, width - first)) for first in range(0, width, FP4_GROUP)]

        @T.macro
        def read_group(line, r, source, i, at, g, first, count):
            lanes = T.meta_var(vector_width(count // 2))
            scale: T.float32 = scale_value(source[i, at, half + g])
            for c in range(T.int64(count // 2 // lanes)):
                for v in T.vectorized(lanes):
                    line[r, first // 2 + c * T.int64(lanes) + v] = (
                        e2m1_value(T.cast(source[i, at, first // 2 + c * T.int64(lanes) + v], "int32")) * scale
                    )
                for v in T.vectorized(lanes):
                    line[r, half + first // 2 + c * T.int64(lanes) + v] = (
                        e2m1_value(
                            T.shift_right(
                                T.cast(source[i, at, first // 2 + c * T.int64(lanes) + v], "int32"), T.int32(4)
                            )
                        )
                        * scale
                    )

        @T.macro
        def write_group(target, i, at, line, r, g, first, count):
            lanes = T.meta_var(vector_width(count))
            code = T.alloc_buffer((1,), "int32")
            _group_scale(code, line, r, T.int64(first), count, lanes, 2, 0x3FFFFF)
            target[i, at, half + g] = T.cast(code[0], "uint8")
            inverse: T.float32 = _float(T.shift_left(T.int32(254) - code[0], T.int32(23)))
            for d in range(T.int64(count // 2)):
                low: T.int32 = e2m1_code(line[r, first + T.int64(2) * d] * inverse)
                high: T.int32 = e2m1_code(line[r, first + T.int64(2) * d + T.int64(1)] * inverse)
                target[i, at, first // 2 + d] = T.cast(T.bitwise_or(low, T.shift_left(high, T.int32(4))), "uint8")

        def each_group(body, *arguments):
            """``body(*arguments, g, first, count)`` for every group."""
            for g, (first, count) in enumerate(groups):
                body(*arguments, g, first, count)

        @T.macro
        def read(line, r, source, i, at):
            each_group(read_group, line, r, source, i, at)

        @T.macro
        def write(target, i, at, line, r):
            each_group(write_group, target, i, at, line, r)

        self.read, self.write, self.copy = read, write, _copier(self.columns)

    def place(self, d: Any) -> Any:
        """Where `read` puts dim `d`, an integer expression."""
        return d // T.int64(2) + d % T.int64(2) * T.int64(self.width // 2)


CacheRows = FloatRows | FP8Rows | FP4Rows


def cache_rows(width: int, name: str) -> CacheRows:
    """The format `name` of rows of `width` dims: ``float32``, ``bfloat16``, ``fp8:ROPE_DIMS`` or ``fp4``."""
    kind, _, rope_dims = name.partition(":")
    if kind == "fp8":
        return FP8Rows(width, int(rope_dims))
    return FP4Rows(width) if kind == "fp4" else FloatRows(width, kind)
