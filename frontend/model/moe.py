"""Mixture of experts: routers (top-k or by token hash), routed experts, shared expert; named as in checkpoints."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from v4c.frontend.config import ModelConfig

from .layers import Linear


class TopKRouter(nn.Module):
    """Learned routing: top-k of sqrt(softplus(logit)) plus a selection-only correction bias."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.empty(config.n_routed_experts))
        self.top_k, self.scaling = config.num_experts_per_tok, config.routed_scaling_factor

    def forward(self, x: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(x, self.weight)
        return torch.ops.v4c.topk_route(logits, self.e_score_correction_bias, self.top_k, self.scaling)


class HashRouter(nn.Module):
    """Routing of the first layers: a fixed table names each token's experts, the logits only weight them."""

    tid2eid: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        table = torch.empty(config.vocab_size, config.num_experts_per_tok, dtype=torch.int64)
        self.register_buffer("tid2eid", table)
        self.scaling = config.routed_scaling_factor

    def forward(self, x: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.v4c.hash_route(F.linear(x, self.weight), input_ids, self.tid2eid, self.scaling)


class Experts(nn.Module):
    """All routed experts' weights, stacked."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, width, hidden = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))
        self.limit = config.swiglu_limit

    def forward(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        return torch.ops.v4c.grouped_experts(x, weights, indices, self.gate_up_proj, self.down_proj, self.limit)


class SharedExpert(nn.Module):
    """The expert every token uses: SwiGLU with the gate clamped above and the up branch on both sides."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.moe_intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.moe_intermediate_size)
        self.down_proj = Linear(config.moe_intermediate_size, config.hidden_size)
        self.limit = config.swiglu_limit

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x).clamp(max=self.limit)
        up = self.up_proj(x).clamp(-self.limit, self.limit)
        return self.down_proj(gate * torch.sigmoid(gate) * up)


class MoE(nn.Module):
    """Routed experts plus the shared one."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.gate = HashRouter(config) if config.mlp_types[layer] == "hash" else TopKRouter(config)
        self.experts = Experts(config)
        self.shared_experts = SharedExpert(config)

    def forward(self, x: Tensor, input_ids: Tensor) -> Tensor:
        """``x [B, S, D]`` and the token ids ``[B, S]`` -> ``[B, S, D]``."""
        weights, indices = self.gate(x, input_ids)
        return self.experts(x, weights, indices) + self.shared_experts(x)
