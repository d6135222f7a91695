"""The number formats of published V4 weights: FP8 in 128 x 128 blocks and FP4 in rows of 32, scaled by powers of two.

Elements and scales follow the OCP Microscaling specification v1.0: E4M3 (section 5.3.1), E2M1 (5.3.3), E8M0 (5.4.1).
Decoding is by tables made from those definitions; a value is ``element * scale``, exact in float32 unless it overflows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import ml_dtypes
import numpy as np

FormatName = Literal["fp8", "fp4"]


def _minifloat(code: int, exponent_bits: int, mantissa_bits: int) -> float:
    """Sign, exponent, mantissa from the top bit down, with subnormals and without infinities."""
    bias = 2 ** (exponent_bits - 1) - 1
    mantissa = code & (2**mantissa_bits - 1)
    exponent = code >> mantissa_bits & (2**exponent_bits - 1)
    sign = -1.0 if code >> (mantissa_bits + exponent_bits) else 1.0
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa * 2.0**-mantissa_bits) * 2.0 ** (exponent - bias)


E4M3_NAN = 0x7F
"""The one NaN of E4M3, but for its sign; there are no infinities."""
E8M0_NAN = 0xFF
E8M0_BIAS = 127

E4M3 = np.array([_minifloat(code, 4, 3) if code & 0x7F != E4M3_NAN else np.nan for code in range(256)], np.float32)
"""Value of every E4M3 code, float32 [256]; the largest is 448."""
E2M1 = np.array([_minifloat(code, 2, 1) for code in range(16)], np.float32)
"""Value of every E2M1 code, float32 [16]; the largest is 6."""
E8M0 = np.array([2.0 ** (code - E8M0_BIAS) if code != E8M0_NAN else np.nan for code in range(256)], np.float32)
"""Value of every E8M0 code, float32 [256]: 2**-127 (a subnormal) to 2**127."""


def _pairs(table: np.ndarray) -> np.ndarray:
    """Two values side by side in one 8-byte item, by the number their codes form: halves the look-ups."""
    low, high = np.meshgrid(table, table)
    return np.stack([low.reshape(-1), high.reshape(-1)], axis=1).view(np.float64)[:, 0].copy()


_E2M1_PAIRS, _E4M3_PAIRS = _pairs(E2M1), _pairs(E4M3)


@dataclass(frozen=True)
class BlockFormat:
    """A matrix ``[R, C]`` of small codes with one scale per block of ``block_rows x block_columns``; blocks at the
    right and lower edge may be smaller.

    Attributes:
        name: ``"fp8"`` or ``"fp4"``.
        per_byte: codes in a byte; the first lies in the low bits.
        largest: largest value a code stands for.
    """

    name: FormatName
    block_rows: int
    block_columns: int
    per_byte: int
    largest: float

    def code_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Shape of the codes of a matrix, in bytes; a last odd FP4 column has a byte of its own."""
        return rows, -(-columns // self.per_byte)

    def scale_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Shape of its scales."""
        return -(-rows // self.block_rows), -(-columns // self.block_columns)


FP8 = BlockFormat("fp8", 128, 128, 1, 448.0)
FP4 = BlockFormat("fp4", 1, 32, 2, 6.0)
FORMATS: dict[str, BlockFormat] = {"fp8": FP8, "fp4": FP4}


def decode(format: BlockFormat, codes: np.ndarray, scales: np.ndarray, columns: int, first_row: int = 0) -> np.ndarray:
    """Values of some rows of a matrix.

    Args:
        format: `FP8` or `FP4`.
        codes: uint8 ``[R, ceil(columns / per_byte)]``.
        scales: float32, those of the blocks that the rows touch, ``[blocks, ceil(columns / block_columns)]``.
        columns: of the matrix.
        first_row: row of the matrix that ``codes[0]`` is.

    Returns:
        float32 ``[R, columns]``; NaN codes and scales give NaN, an overflow infinity.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if format is FP4:
            values = np.take(_E2M1_PAIRS, codes).view(np.float32)[:, :columns]
            _scale_groups(values, scales, format.block_columns)
            return np.ascontiguousarray(values)
        values = np.empty(codes.shape, np.float32)
        block, first_block = format.block_rows, first_row // format.block_rows
        for i in range(len(scales)):  # block by block, so that what is looked up stays in cache
            start = max(0, (first_block + i) * block - first_row)
            stop = min(len(values), (first_block + i + 1) * block - first_row)
            across = np.repeat(scales[i], format.block_columns)[:columns]
            np.multiply(_e4m3(codes[start:stop]), across, out=values[start:stop])
        return values


def _e4m3(codes: np.ndarray) -> np.ndarray:
    flat = codes.reshape(-1)
    even = np.append(flat, np.uint8(0)) if flat.size % 2 else flat
    return np.take(_E4M3_PAIRS, even.view("<u2")).view(np.float32)[: flat.size].reshape(codes.shape)


def _scale_groups(values: np.ndarray, scales: np.ndarray, width: int) -> None:
    """Multiply each group of `width` columns by its scale, in place."""
    rows, columns = values.shape
    whole = columns // width
    if whole:
        groups = np.lib.stride_tricks.as_strided(
            values, (rows, whole, width), (values.strides[0], width * values.strides[1], values.strides[1])
        )
        groups *= scales[:, :whole, None]
    values[:, whole * width :] *= scales[:, whole:]


def encode(format: BlockFormat, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of a matrix, or of rows of it that start at a block.

    A block's scale is the smallest power of two with which its largest value does not saturate; elements are rounded to
    the nearest code, ties to even.

    Args:
        format: `FP8` or `FP4`.
        values: float32 ``[R, C]``, below 2**127 in magnitude.

    Returns:
        codes uint8 ``[R, ceil(C / per_byte)]`` and E8M0 scale codes uint8 ``[ceil(R / rows), ceil(C / columns)]``.
    """
    rows, columns = values.shape
    down, across = format.scale_shape(rows, columns)
    padded = np.zeros((down * format.block_rows, across * format.block_columns), np.float32)
    padded[:rows, :columns] = values
    blocks = padded.reshape(down, format.block_rows, across, format.block_columns)
    # frexp: x = m * 2**e with m in [0.5, 1), so 2**e is the next power of two, and x itself is one where m is 0.5.
    mantissa, exponent = np.frexp(np.abs(blocks).max(axis=(1, 3)) / np.float32(format.largest))
    exponent = np.where(mantissa == 0.5, exponent - 1, exponent)
    scales = np.clip(exponent + E8M0_BIAS, 0, E8M0_NAN - 1).astype(np.uint8)
    blocks *= (1 / E8M0[scales].astype(np.float64)).astype(np.float32)[:, None, :, None]
    np.clip(blocks, -format.largest, format.largest, out=blocks)
    if format is FP8:
        codes = padded[:rows, :columns].astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
        return np.ascontiguousarray(codes), scales
    single = padded[:rows, : columns + columns % 2].astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 15
    return single[:, ::2] | single[:, 1::2] << 4, scales
