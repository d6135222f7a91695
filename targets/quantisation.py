"""Weights of 8 or 4 bits, one scale per output and group of inputs: which codes stand for which weights.

A weight is ``scale * code``, `code` an integer of 8 or 4 bits, `scale` a float16 shared by `GROUP` consecutive inputs
of one output. How codes and scales lie in memory is each target's own.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

GROUP = 32
"""Inputs that share a scale, of weights and of activations; the group of llama.cpp's Q8_0 and Q4_0."""

QUANTISED = {"int8": 8, "int4": 4}
"""Storage dtypes of this module and their bits per weight."""

OFFSET = {8: 128, 4: 8}
"""What is added to a code to store it unsigned."""

CHUNK = 1 << 18
"""Weights converted at a time: the temporaries stay in the cache."""

_ENDS = (8.0, 7.0, 7.5, 8.5, 9.0)
_LARGEST = float(np.finfo(np.float16).max)


def groups(k: int) -> int:
    """Number of groups that hold `k` inputs."""
    return -(-k // GROUP)


def quantise(values: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of groups of weights.

    8 bits: the scale maps the largest magnitude to 127. 4 bits: `_scales4`.

    Args:
        values: ``[..., GROUP]`` float32.
        bits: 8 or 4.

    Returns:
        ``[..., GROUP]`` uint8, the codes plus `OFFSET`; ``[..., 1]`` float16. Codes are chosen for the scale as it is
        stored, so its rounding costs no more than a finer or coarser step.

    Raises:
        ValueError: a weight is not a finite number, or larger than a float16 can be.
    """
    largest = np.abs(values).max(-1, keepdims=True)
    if not np.all(largest <= _LARGEST):
        raise ValueError(
            f"int{bits} weights: expected finite numbers of up to {_LARGEST:g}, found {float(np.max(largest)):g}"
        )
    scale = largest / np.float32(127) if bits == 8 else _scales4(values)
    scale = scale.astype(np.float16)
    wide = scale.astype(np.float32)
    low, high = (-127, 127) if bits == 8 else (-8, 7)
    codes = np.rint(values * _reciprocal(wide))
    np.clip(codes, low, high, out=codes)
    codes += OFFSET[bits]
    return codes.astype(np.uint8), scale


def _reciprocal(scale: np.ndarray) -> np.ndarray:
    """1 / scale, and 0 where that would be too large for a float32: such a scale is 0 as a float16."""
    return np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=np.abs(scale) > 1e-30)


def _scales4(values: np.ndarray) -> np.ndarray:
    """Scales of 4-bit groups ``[..., GROUP]`` as ``[..., 1]`` float32.

    The value of largest magnitude gets code -8, as in llama.cpp's Q4_0, or -`c` for the other `_ENDS` c; for the codes
    q that follow, the scale of least squares is ``sum(w q) / sum(q q)``, and the c with the smallest squared error,
    which is the one with the largest ``sum(w q)**2 / sum(q q)``, is taken. On normally distributed weights that makes
    the error 5 % smaller than Q4_0's; a search in steps of 1/4 from 6 to 10 would gain another 0.4 %.
    """
    at = np.abs(values).argmax(-1)[..., None]
    largest = np.take_along_axis(values, at, -1)
    inverse = _reciprocal(largest)
    best = np.zeros_like(largest)
    most = np.zeros_like(largest)
    for end in _ENDS:
        codes = np.rint(values * (inverse * np.float32(-end)))
        np.clip(codes, -8, 7, out=codes)
        along = np.einsum("...g,...g->...", values, codes)[..., None]
        length = np.einsum("...g,...g->...", codes, codes)[..., None]
        scale = np.divide(along, length, out=np.zeros_like(along), where=length != 0)
        better = along * scale > most
        np.copyto(best, scale, where=better)
        np.copyto(most, along * scale, where=better)
    return best


def each_chunk(weight: np.ndarray, chunk: int, body: Callable[[int, int, np.ndarray], None]) -> None:
    """``body(lead, first, rows)`` for up to `chunk` rows of ``[L, N, K]`` at a time: ``[rows, G, GROUP]`` float32."""
    lead, n, k = weight.shape
    padded = groups(k) * GROUP
    for i in range(lead):
        for first in range(0, n, chunk):
            part = weight[i, first : first + chunk].astype(np.float32, order="C", copy=False)
            if padded != k:
                part = np.pad(part, ((0, 0), (0, padded - k)))
            body(i, first, part.reshape(len(part), -1, GROUP))


def dequantised(weight: np.ndarray, bits: int) -> np.ndarray:
    """What the kernels compute with: ``scale * code`` of every weight.

    Args:
        weight: ``[..., K]`` of any float dtype; groups are taken along the last axis.
        bits: 8 or 4.

    Returns:
        float32 of the same shape.
    """
    k = weight.shape[-1]
    flat = weight.reshape(1, -1, k)
    values = np.empty(flat.shape, np.float32)

    def fill(i: int, first: int, rows: np.ndarray) -> None:
        codes, scales = quantise(rows, bits)
        wide = (codes.astype(np.float32) - OFFSET[bits]) * scales.astype(np.float32)
        values[i, first : first + len(rows)] = wide.reshape(len(rows), -1)[:, :k]

    each_chunk(flat, max(1, CHUNK // (groups(k) * GROUP)), fill)
    return values.reshape(weight.shape)
