"""How weights lie in memory for the CPU kernels: in panels of output rows, contiguous, one column after the other.

A matrix-vector product then reads every panel as one sequential stream, and a product of many rows reuses one panel
from cache. Packing is done once, when a model is compiled, with NumPy alone.
"""

from __future__ import annotations

import numpy as np

PANEL = 32
"""Output rows per panel: two AVX-512 vectors of float32, one cache line of bfloat16.

Measured on 4096 x 4096: 32 and 64 run at the memory's speed for one row and equally fast for 256 rows; 16 is a quarter
slower at 256 rows. Of the two, 32 pads narrow outputs less.
"""


def panels(n: int, panel: int = PANEL) -> int:
    """Number of panels that hold `n` output rows."""
    return -(-n // panel)


def packed_shape(shape: tuple[int, ...], panel: int = PANEL) -> tuple[int, ...]:
    """Shape of a packed weight: ``[..., N, K]`` becomes ``[..., ceil(N / panel), K, panel]``."""
    *lead, n, k = shape
    return (*lead, panels(n, panel), k, panel)


def pack_rows(weight: np.ndarray, panel: int = PANEL) -> np.ndarray:
    """Pack the rows of a weight into panels; missing rows of the last panel are zero.

    Args:
        weight: ``[..., N, K]`` of any dtype, row n holding the weights of output n.
        panel: rows per panel.

    Returns:
        ``[..., ceil(N / panel), K, panel]`` of the same dtype, C-contiguous.
    """
    *lead, n, k = weight.shape
    count = panels(n, panel)
    packed = np.zeros((*lead, count, k, panel), weight.dtype)
    full = n // panel
    blocks = weight[..., : full * panel, :].reshape(*lead, full, panel, k)
    packed[..., :full, :, :] = blocks.swapaxes(-1, -2)
    if full < count:
        packed[..., full, :, : n - full * panel] = weight[..., full * panel :, :].swapaxes(-1, -2)
    return packed


def pack_gate_up(weight: np.ndarray, panel: int = PANEL) -> np.ndarray:
    """Pack a merged gate and up projection so that matching gate and up panels are neighbours.

    Args:
        weight: ``[..., 2F, D]``; rows [0, F) are the gate, rows [F, 2F) the up projection.
        panel: rows per panel.

    Returns:
        ``[..., 2 ceil(F / panel), D, panel]``; panel 2i holds gate rows, panel 2i + 1 the up rows of the same outputs.
    """
    *lead, rows, k = weight.shape
    halves = pack_rows(weight.reshape(*lead, 2, rows // 2, k), panel)
    return np.ascontiguousarray(halves.swapaxes(-4, -3)).reshape(*lead, 2 * panels(rows // 2, panel), k, panel)


def packed_gate_up_shape(shape: tuple[int, ...], panel: int = PANEL) -> tuple[int, ...]:
    """Shape of `pack_gate_up`'s result for a weight of shape ``[..., 2F, D]``."""
    *lead, rows, k = shape
    return (*lead, 2 * panels(rows // 2, panel), k, panel)
