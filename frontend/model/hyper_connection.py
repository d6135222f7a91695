"""Manifold-constrained hyper-connections (mHC): the residual is a few streams, mixed around every sublayer.

Two modules hold the weights under their checkpoint names; the arithmetic is in the custom ops `mhc_pre`, `mhc_post`
and `mhc_head`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from v4c.frontend.config import ModelConfig


class HyperConnection(nn.Module):
    """Mixing weights of one sublayer (mHC, arXiv 2512.24880, eqs. 5-9)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        streams = config.hc_mult
        rows = (2 + streams) * streams
        self.fn = nn.Parameter(torch.empty(rows, streams * config.hidden_size))
        self.base = nn.Parameter(torch.empty(rows))
        self.scale = nn.Parameter(torch.empty(3))
        self.iterations, self.hc_eps, self.norm_eps = config.hc_sinkhorn_iters, config.hc_eps, config.rms_norm_eps

    def collapse(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``[B, S, M, D]`` -> the sublayer's input ``[B, S, D]``, ``post [B, S, M]`` and ``comb [B, S, M, M]``."""
        return torch.ops.v4c.mhc_pre(
            streams, self.fn, self.base, self.scale, self.iterations, self.hc_eps, self.norm_eps
        )

    @staticmethod
    def expand(output: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        """The sublayer's output ``[B, S, D]`` written back into the mixed streams ``[B, S, M, D]``."""
        return torch.ops.v4c.mhc_post(output, streams, post, comb)


class HyperHead(nn.Module):
    """Collapses the streams before the final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.hc_fn = nn.Parameter(torch.empty(config.hc_mult, config.hc_mult * config.hidden_size))
        self.hc_base = nn.Parameter(torch.empty(config.hc_mult))
        self.hc_scale = nn.Parameter(torch.empty(1))
        self.hc_eps, self.norm_eps = config.hc_eps, config.rms_norm_eps

    def forward(self, streams: Tensor) -> Tensor:
        """``[B, S, M, D]`` -> ``[B, S, D]``."""
        return torch.ops.v4c.mhc_head(streams, self.hc_fn, self.hc_base, self.hc_scale, self.hc_eps, self.norm_eps)
