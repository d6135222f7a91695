"""Published FP8 and FP4 weights as a checkpoint has them: what every target packs ``--quant native`` from.

Elements are E4M3 and E2M1, scales E8M0 (OCP Microscaling specification v1.0).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NATIVE_GROUPS = {"fp8": 128, "fp4": 32}
"""Storage dtypes, and the inputs that share a scale."""

ONE = 127
"""E8M0 code of 1."""


@dataclass(frozen=True)
class NativeRows:
    """Rows of a weight as a checkpoint has them.

    Attributes:
        codes: uint8 ``[..., N, K]`` of FP8, ``[..., N, ceil(K / 2)]`` of FP4, the even input in the low bits.
        scales: uint8 ``[..., N, ceil(K / group)]``, E8M0.
    """

    codes: np.ndarray
    scales: np.ndarray

    def reshaped(self, *lead: int) -> NativeRows:
        """The same rows with other leading dimensions."""
        return NativeRows(*(a.reshape(*lead, a.shape[-1]) for a in (self.codes, self.scales)))

    def split(self, sizes: Sequence[int]) -> list[NativeRows]:
        """Runs of rows of a matrix."""
        ends = np.cumsum(sizes)[:-1]
        return [NativeRows(c, s) for c, s in zip(np.split(self.codes, ends), np.split(self.scales, ends), strict=True)]
