"""Narrow cache rows in NumPy, with the number types of `ml_dtypes`: what kernels and torch are compared with."""

from __future__ import annotations

import ml_dtypes
import numpy as np


def _scale(group: np.ndarray, largest: float) -> int:
    """Exponent of the smallest power of two, at least 2**-100, with which no element exceeds `largest`."""
    exponent = -100
    while np.abs(group).max(initial=0) > np.ldexp(largest, exponent):
        exponent += 1
    return exponent


def _codes(row: np.ndarray, width: int, largest: float, dtype: type) -> tuple[list[int], list[int]]:
    """Codes of a row, and the E8M0 codes of its groups of `width`."""
    codes: list[int] = []
    scales = []
    for first in range(0, len(row), width):
        group = row[first : first + width]
        exponent = _scale(group, largest)
        codes += np.ldexp(group, -exponent).astype(dtype).view(np.uint8).tolist()
        scales.append(exponent + 127)
    return codes, scales


def fp8_row(row: np.ndarray, rope_dims: int) -> bytes:
    """A finite float32 row as FP8: codes, bfloat16 of the rotated dims, scales."""
    plain = len(row) - rope_dims
    codes, scales = _codes(row[:plain], 64, 448.0, ml_dtypes.float8_e4m3fn)
    scales += [0] * (-len(scales) % 8)
    return bytes(codes) + row[plain:].astype(ml_dtypes.bfloat16).tobytes() + bytes(scales)


def fp4_row(row: np.ndarray) -> bytes:
    """A finite float32 row of even length as FP4."""
    codes, scales = _codes(row, 32, 6.0, ml_dtypes.float4_e2m1fn)
    return bytes(low | high << 4 for low, high in zip(codes[::2], codes[1::2], strict=True)) + bytes(scales)


def fp8_values(row: bytes, width: int, rope_dims: int) -> np.ndarray:
    """Values of an FP8 row, float32 ``[width]``."""
    plain = width - rope_dims
    raw = np.frombuffer(row, np.uint8)
    scales = 2.0 ** (raw[plain + 2 * rope_dims :].astype(int) - 127)
    codes = raw[:plain].view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    rope = raw[plain : plain + 2 * rope_dims].copy().view(ml_dtypes.bfloat16).astype(np.float64)
    return np.concatenate([codes * np.repeat(scales, 64)[:plain], rope]).astype(np.float32)


def fp4_values(row: bytes, width: int) -> np.ndarray:
    """Values of an FP4 row, float32 ``[width]``."""
    raw = np.frombuffer(row, np.uint8)
    codes = np.stack([raw[: width // 2] & 15, raw[: width // 2] >> 4], axis=1).reshape(-1)
    scales = 2.0 ** (raw[width // 2 :].astype(int) - 127)
    values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float64) * np.repeat(scales, 32)[:width]
    return values.astype(np.float32)


def stored(rows: np.ndarray, name: str) -> np.ndarray:
    """Rows ``[..., width]`` as a cache of format `name` (`row_formats`) has them."""
    if name in ("float32", "bfloat16"):
        return rows.astype(ml_dtypes.bfloat16 if name == "bfloat16" else np.float32)
    flat = rows.reshape(-1, rows.shape[-1])
    kind, _, rope_dims = name.partition(":")
    packed = [fp4_row(row) if kind == "fp4" else fp8_row(row, int(rope_dims)) for row in flat]
    columns = len(fp4_row(flat[0] * 0) if kind == "fp4" else fp8_row(flat[0] * 0, int(rope_dims))) if len(flat) else 0
    return np.frombuffer(b"".join(packed), np.uint8).reshape(*rows.shape[:-1], columns).copy()


def values(cache: np.ndarray, width: int, name: str) -> np.ndarray:
    """What a cache of format `name` gives back, float32 ``[..., width]``."""
    if cache.dtype != np.uint8:
        return cache.astype(np.float32)
    kind, _, rope_dims = name.partition(":")
    flat = [row.tobytes() for row in cache.reshape(-1, cache.shape[-1])]
    read = [fp4_values(row, width) if kind == "fp4" else fp8_values(row, width, int(rope_dims)) for row in flat]
    return np.array(read, np.float32).reshape(*cache.shape[:-1], width)
