"""Rotation speeds: ``inv_freq`` for sliding layers (plain) and for compressed layers (their own theta, with YaRN).

Computed with the same float32 torch operations as the reference, in the same order: at position 1e6 one unit in the
last place of a speed near 1 is an angle of 0.06, so "about equal" would not do.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .config import ModelConfig, YarnScaling

RopeKind = Literal["main", "compress"]


def inv_freq(config: ModelConfig, kind: RopeKind) -> np.ndarray:
    """``[R / 2]`` float32: angle per position of each rotated pair.

    ``"main"`` is for sliding layers; ``"compress"`` for queries, keys and compressed rows of CSA and HCA layers and
    their indexer. The amplitude is 1.0 in both: V4 does not use YaRN's attention factor.
    """
    width = config.qk_rope_head_dim
    theta = config.rope_theta if kind == "main" else config.compress_rope_theta
    wavelengths = theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    speeds = 1.0 / wavelengths
    if kind == "compress" and config.yarn is not None:
        kept = 1 - _interpolated_share(config.yarn, width, theta)
        speeds = 1.0 / (config.yarn.factor * wavelengths) * (1 - kept) + speeds * kept
    return speeds.numpy()


def _interpolated_share(yarn: YarnScaling, width: int, theta: float) -> Tensor:
    """``[R / 2]`` float32: 0 where a pair keeps its speed, 1 where YaRN slows it fully (arXiv 2309.00071, 3.2)."""

    def pair_that_turns(times: float) -> float:
        """The (fractional) dim whose wavelength fits `times` into the original context."""
        turns = yarn.original_max_position_embeddings / (times * 2 * math.pi)
        return width * math.log(turns) / (2 * math.log(theta))

    low, high = pair_that_turns(yarn.beta_fast), pair_that_turns(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001  # a step instead of a division by zero
    return ((torch.arange(width // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
