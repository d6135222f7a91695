"""Hyper-connections for training: the arithmetic of `v4c.custom_ops.mhc_pre`, with the mixing matrices laid out first.

Twenty Sinkhorn iterations on 4 x 4 matrices per token are many operations on tiny axes; with tokens on the last axis
they run over long rows and cost a tenth.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from v4c.frontend.config import ModelConfig

Mixing = Tensor | None


class _Sinkhorn(torch.autograd.Function):
    """Alternating normalisation of ``[M, M, T]`` (columns first, as `mhc_pre` does), with a hand-written gradient.

    y = x / (sum(x) + eps) has the gradient (g - sum(g * y)) / (sum(x) + eps): only y and the divisor are kept.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, iterations: int, eps: float) -> Tensor:
        kept = []
        for step in range(2 * iterations - 1):
            divisor = x.sum(step % 2, keepdim=True).add_(eps).reciprocal_()
            x = x * divisor
            kept += [x, divisor]
        ctx.save_for_backward(*kept)
        return x

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None, None]:
        kept, (g,) = ctx.saved_tensors, gradients  # type: ignore[attr-defined]
        for step in range(len(kept) // 2 - 1, -1, -1):
            y, divisor = kept[2 * step], kept[2 * step + 1]
            g = (g - (g * y).sum(step % 2, keepdim=True)) * divisor
        return g, None, None


class _Mix(torch.autograd.Function):
    """stream_k = sum_j comb[j, k] * stream_j, by rows of D: a batched product of 4 x 4 matrices costs several times it.

    ``comb [B, S, M, M]`` and ``streams [B, S, M, D]``.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, comb: Tensor, streams: Tensor) -> Tensor:
        ctx.save_for_backward(comb, streams)
        return _weighted(comb, streams)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        comb, streams = ctx.saved_tensors  # type: ignore[attr-defined]
        (g,) = gradients
        return torch.matmul(streams, g.transpose(2, 3)), _weighted(comb.transpose(2, 3), g)


def _weighted(comb: Tensor, streams: Tensor) -> Tensor:
    out = comb[:, :, 0, :, None] * streams[:, :, 0, None, :]
    for j in range(1, comb.shape[2]):
        out.addcmul_(comb[:, :, j, :, None], streams[:, :, j, None, :])
    return out


class Mixer:
    """mHC around the sublayers of one model, or a plain residual of one stream."""

    def __init__(self, config: ModelConfig, plain: bool) -> None:
        self.count, self.iterations, self.plain = config.hc_mult, config.hc_sinkhorn_iters, plain
        self.hc_eps, self.norm_eps = config.hc_eps, config.rms_norm_eps

    def project(self, streams: Tensor, fn: Tensor) -> Tensor:
        """Unweighted RMS norm over all streams together, then a linear map: ``[B, S, M, D]`` -> ``[B, S, Z]``."""
        flat = streams.flatten(2)
        scale = torch.rsqrt(flat.square().mean(-1, keepdim=True) + self.norm_eps)
        return F.linear(flat, fn) * scale

    def collapse(self, weights: dict[str, Tensor], prefix: str, streams: Tensor) -> tuple[Tensor, Mixing, Mixing]:
        """The sublayer's input ``[B, S, D]``, ``post [B, S, M]`` and ``comb [B, S, M, M]`` (None in a plain one)."""
        if self.plain:
            return streams.squeeze(2), None, None
        m = self.count
        fn, base, scale = (weights[prefix + name] for name in ("fn", "base", "scale"))
        pre, post, comb = self.project(streams, fn).split([m, m, m * m], dim=-1)
        pre_base, post_base, comb_base = base.split([m, m, m * m])
        pre = torch.sigmoid(pre * scale[0] + pre_base) + self.hc_eps
        post = 2 * torch.sigmoid(post * scale[1] + post_base)
        mixing = (comb * scale[2] + comb_base).flatten(0, 1).t().contiguous().view(m, m, -1)
        mixing = _Sinkhorn.apply(mixing.softmax(1) + self.hc_eps, self.iterations, self.hc_eps)
        comb = mixing.flatten(0, 1).t().reshape(*comb.shape[:2], m, m)
        return (pre.unsqueeze(-1) * streams).sum(2), post, comb

    def expand(self, output: Tensor, streams: Tensor, post: Mixing, comb: Mixing) -> Tensor:
        """The sublayer's output ``[B, S, D]`` written back into the mixed streams ``[B, S, M, D]``."""
        if post is None or comb is None:
            return streams + output.unsqueeze(2)
        return post.unsqueeze(-1) * output.unsqueeze(2) + _Mix.apply(comb, streams)


def collapse_head(mixer: Mixer, weights: dict[str, Tensor], prefix: str, streams: Tensor) -> Tensor:
    """``[B, S, M, D]`` -> ``[B, S, D]`` before the final norm."""
    if mixer.plain:
        return streams.squeeze(2)
    fn, base, scale = (weights[f"{prefix}hc_{name}"] for name in ("fn", "base", "scale"))
    shares = torch.sigmoid(mixer.project(streams, fn) * scale + base) + mixer.hc_eps
    return (shares.unsqueeze(-1) * streams).sum(2)
