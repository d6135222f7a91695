"""How bfloat16 weights lie in memory for products with rows of bfloat16: inputs in pairs, as ``vdpbf16ps`` reads them.

A panel is that of `packing` with two neighbouring inputs of an output side by side, a 32-bit word: the even input is
its low half. Of an odd number of inputs the last has a zero for company.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from .packing import PANEL, pack_gate_up, pack_rows, packed_gate_up_shape, packed_shape

STEP_BYTES = 4 * PANEL
"""Bytes of a pair of inputs of a panel."""


def pairs(k: int) -> int:
    """Number of pairs of `k` inputs."""
    return -(-k // 2)


def pair_pack_rows(weight: np.ndarray) -> np.ndarray:
    """Weights ``[..., N, K]`` rounded to bfloat16: ``[..., ceil(N / PANEL), ceil(K / 2), STEP_BYTES]`` uint8."""
    return _paired(pack_rows(weight.astype(ml_dtypes.bfloat16, copy=False)))


def pair_pack_gate_up(weight: np.ndarray) -> np.ndarray:
    """The same of a merged gate and up projection ``[..., 2F, D]``, whose panels take turns as in `pack_gate_up`."""
    return _paired(pack_gate_up(weight.astype(ml_dtypes.bfloat16, copy=False)))


def pair_packed_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of `pair_pack_rows`'s result for weights of `shape`."""
    *lead, k, _ = packed_shape(shape)
    return (*lead, pairs(k), STEP_BYTES)


def pair_packed_gate_up_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of `pair_pack_gate_up`'s result for weights of `shape`."""
    *lead, k, _ = packed_gate_up_shape(shape)
    return (*lead, pairs(k), STEP_BYTES)


def _paired(packed: np.ndarray) -> np.ndarray:
    """Panels ``[..., K, PANEL]`` with their inputs in pairs."""
    *lead, k, panel = packed.shape
    if k % 2:
        packed = np.concatenate([packed, np.zeros((*lead, 1, panel), packed.dtype)], axis=-2)
    words = np.ascontiguousarray(packed.reshape(*lead, pairs(k), 2, panel).swapaxes(-1, -2))
    return words.view(np.uint8).reshape(*lead, pairs(k), STEP_BYTES)
