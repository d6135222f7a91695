"""Routing, routed experts and Engram without data-dependent shapes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from v4c.custom_ops.topk_route import route_weights

from .select import first_of_few


def topk_route(logits: Tensor, bias: Tensor, top_k: int, scaling: float) -> tuple[Tensor, Tensor]:
    """As `v4c.custom_ops.topk_route.topk_route`."""
    scores = functional.softplus(logits).sqrt()
    indices = first_of_few(scores + bias, top_k)
    return route_weights(scores, indices, scaling), indices


def grouped_experts(x: Tensor, weights: Tensor, indices: Tensor, gate_up: Tensor, down: Tensor, limit: float) -> Tensor:
    """As `v4c.custom_ops.grouped_experts.grouped_experts`, token by token.

    Products are spelled as multiplication and sum, so that a compiler can gather the chosen experts' weights inside
    the product; a matmul would want them copied, once per token and choice.
    """
    used = indices >= 0
    expert = indices.clamp(min=0)
    half = down.shape[2]
    gate = (x[:, :, None, None] * gate_up[expert, :half].to(x.dtype)).sum(-1).clamp(max=limit)
    up = (x[:, :, None, None] * gate_up[expert, half:].to(x.dtype)).sum(-1).clamp(-limit, limit)
    hidden = gate * torch.sigmoid(gate) * up * torch.where(used, weights, 0.0).unsqueeze(-1)
    return (hidden.unsqueeze(-2) * down[expert].to(x.dtype)).sum(-1).sum(2)
