"""The two building blocks every part of the model shares: a bias-free linear layer and RMSNorm.

They exist beside torch's own so that parameters are created empty (a checkpoint or a trace fills them) and the
traced graph holds exactly one MatMul or one RMSNormalization.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Module):
    """``y = x @ weight.T`` with ``weight [out_features, in_features]``."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class RMSNorm(nn.Module):
    """RMS normalisation over the last axis with a learned weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def unweighted_rms_norm(x: Tensor, eps: float) -> Tensor:
    """RMS normalisation over the last axis without a weight (the queries' per-head norm)."""
    return F.rms_norm(x, (x.shape[-1],), x.new_ones(x.shape[-1]), eps)
