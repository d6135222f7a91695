"""Weights of 8 or 4 bits as the CUDA kernels read them: rows of codes, each with its scales behind.

A row of K weights is one run of bytes (`kernels/source/weights.cuh` decodes it): the codes, one byte each or two to a
byte (the even input in the low bits), filled up to a multiple of 16 bytes with codes of zero; then a scale per group of
inputs, filled up likewise. Codes of int8 and int4 are stored unsigned, as `v4c.targets.quantisation` gives them, with
float16 scales; FP8 and FP4 as published, with E8M0 scales.
"""

from __future__ import annotations

import numpy as np

from ..native_rows import NATIVE_GROUPS, NativeRows
from ..quantisation import GROUP, OFFSET, QUANTISED, each_chunk, quantise

CTYPES = {"fp8": "v4c::Fp8", "fp4": "v4c::Fp4", "int8": "v4c::Int8", "int4": "v4c::Int4"}
"""Storage dtypes of this module to the types that the device functions know them by."""

_WHOLE = 16
_BITS = {"fp8": 8, "fp4": 4, **QUANTISED}
_GROUPS = {**NATIVE_GROUPS, **dict.fromkeys(QUANTISED, GROUP)}
_SCALE_BYTES = {**dict.fromkeys(NATIVE_GROUPS, 1), **dict.fromkeys(QUANTISED, 2)}


def _whole(nbytes: int) -> int:
    return -(-nbytes // _WHOLE) * _WHOLE


def code_bytes(k: int, dtype: str) -> int:
    """Bytes of the codes of a row of `k` weights, those that fill it up included."""
    return _whole(-(-k * _BITS[dtype] // 8))


def row_bytes(k: int, dtype: str) -> int:
    """Bytes of a row of `k` weights."""
    return code_bytes(k, dtype) + _whole(-(-k // _GROUPS[dtype]) * _SCALE_BYTES[dtype])


def pack_published(rows: NativeRows, k: int, dtype: str) -> np.ndarray:
    """FP8 or FP4 rows of `k` weights; uint8 ``[..., N, row_bytes]``."""
    packed = np.zeros((*rows.codes.shape[:-1], row_bytes(k, dtype)), np.uint8)
    packed[..., : rows.codes.shape[-1]] = rows.codes
    start = code_bytes(k, dtype)
    packed[..., start : start + rows.scales.shape[-1]] = rows.scales
    return packed


def pack_quantised(weight: np.ndarray, dtype: str) -> np.ndarray:
    """Rows ``[..., N, K]`` of any float dtype, quantised to int8 or int4; uint8 ``[..., N, row_bytes]``."""
    *lead, n, k = weight.shape
    flat = weight.reshape(-1, n, k)
    bits, start = QUANTISED[dtype], code_bytes(k, dtype)
    zero = OFFSET[bits] * (1 if bits == 8 else 0x11)
    packed = np.zeros((len(flat), n, row_bytes(k, dtype)), np.uint8)
    packed[..., :start] = zero

    def fill(i: int, first: int, rows: np.ndarray) -> None:
        codes, scales = quantise(rows, bits)
        codes = codes.reshape(len(rows), -1)
        if bits == 4:
            codes = codes[:, ::2] | codes[:, 1::2] << 4
        part = packed[i, first : first + len(rows)]
        width = min(codes.shape[1], start)  # the last group may be longer than the row's whole 16 bytes; its rest is 0
        part[:, :width] = codes[:, :width]
        held = np.ascontiguousarray(scales[..., 0]).astype("<f2").view(np.uint8)
        part[:, start : start + held.shape[1]] = held

    each_chunk(flat, max(1, (1 << 18) // k), fill)
    return packed.reshape(*lead, n, -1)
