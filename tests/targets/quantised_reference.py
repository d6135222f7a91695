"""What the quantised kernels compute, in float64 NumPy: the rounding of rows, and products with dequantised weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

BITS = {"int8": 8, "int4": 4}


def _has_vnni() -> bool:
    """Whether this machine, and with it the harness's target, has AVX512-VNNI."""
    cpu = Path("/proc/cpuinfo")
    return cpu.exists() and {"avx512_vnni", "avx512_bf16"} <= set(cpu.read_text().split())


VNNI = [False, pytest.param(True, marks=pytest.mark.skipif(not _has_vnni(), reason="this machine has no AVX512-VNNI"))]
"""Values of the factories' argument `vnni`."""


def rounded(x: np.ndarray, group: int = 32, accuracy: float = 1e-6) -> tuple[np.ndarray, np.ndarray]:
    """Rows ``[..., K]`` as the kernels read them: groups of 32 in steps of a 127th of their largest magnitude.

    Args:
        x: the rows.
        group: inputs that share a scale.
        accuracy: relative error that a kernel's x and its arithmetic may have.

    Returns:
        The rounded rows in float64, and for every value how far a kernel may be off: a whole step where the value is
        as good as halfway between two, where the last bit decides, elsewhere nothing.
    """
    k = x.shape[-1]
    padded = np.zeros((*x.shape[:-1], -(-k // group) * group), np.float64)
    padded[..., :k] = x
    grouped = padded.reshape(*x.shape[:-1], -1, group)
    scale = np.abs(grouped).max(-1, keepdims=True) / 127
    scale[scale < np.finfo(np.float32).tiny] = 0
    steps = np.divide(grouped, scale, out=np.zeros_like(grouped), where=scale != 0)
    undecided = np.abs(np.abs(steps - np.rint(steps)) - 0.5) <= accuracy * (1 + np.abs(steps))
    values, slack = np.rint(steps) * scale, undecided * scale
    return values.reshape(padded.shape)[..., :k], slack.reshape(padded.shape)[..., :k]
