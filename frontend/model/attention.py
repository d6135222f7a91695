"""Attention of a V4 layer: shared-KV multi-query attention over a sliding window plus compressed rows (CSA or HCA).

The module keeps the checkpoint's parameter names. State lives outside: each call takes the layer's caches and returns
the updated ones, under the names `cache_specs` gives.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from v4c.frontend.config import ModelConfig
from v4c.frontend.estimate import CacheDtype

from .cache_rounding import rounded_index_row, rounded_row
from .layers import Linear, RMSNorm, unweighted_rms_norm

Caches = dict[str, Tensor]


def rope(x: Tensor, positions: Tensor, inv_freq: Tensor, sign: float = 1.0) -> Tensor:
    """Rotate the trailing dims of ``x [B, S, H, C]``; sign -1 rotates back."""
    return torch.ops.v4c.trailing_rope(x, positions, inv_freq, sign)


class Compressor(nn.Module):
    """Pools every window of `ratio` tokens into one row (V4 paper, section 2.3, eqs. 9-12 and 20-23).

    With `overlap` (CSA) each token contributes two rows side by side, one to its own window and one to the next.
    """

    def __init__(self, config: ModelConfig, ratio: int, width: int, overlap: bool) -> None:
        super().__init__()
        columns = 2 * width if overlap else width
        self.kv_proj = Linear(config.hidden_size, columns)
        self.gate_proj = Linear(config.hidden_size, columns)
        self.position_bias = nn.Parameter(torch.empty(ratio, columns))
        self.kv_norm = RMSNorm(width, config.rms_norm_eps)
        self.ratio = ratio

    def compress(
        self, x: Tensor, inv_freq: Tensor, state: tuple[Tensor, Tensor, Tensor], positions: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Feed ``x [B, S, D]`` into `state` (kv ring, gate ring, compressed rows); returns the updated state."""
        return torch.ops.v4c.kv_compress(
            self.kv_proj(x), self.gate_proj(x), self.position_bias, self.kv_norm.weight, inv_freq, *state,
            positions, lengths, self.ratio, self.kv_norm.eps,
        )  # fmt: skip


class Scorer(nn.Module):
    """Per-head weights of the lightning indexer's score."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weights_proj = Linear(config.hidden_size, config.index_n_heads)


class Indexer(Compressor):
    """Lightning indexer: its own compressor and queries choose the `index_topk` rows a CSA query reads (eqs. 13-17)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, config.csa_ratio, config.index_head_dim, overlap=True)
        self.q_b_proj = Linear(config.q_lora_rank, config.index_n_heads * config.index_head_dim)
        self.scorer = Scorer(config)
        self.heads, self.width, self.top_k = config.index_n_heads, config.index_head_dim, config.index_topk

    def choose(
        self, x: Tensor, q_residual: Tensor, rows: Tensor, inv_freq: Tensor, positions: Tensor, lengths: Tensor
    ) -> Tensor:
        """Indices ``[B, S, top_k]`` of the chosen rows, -1 where fewer are ready."""
        q = rope(self.q_b_proj(q_residual).unflatten(-1, (self.heads, self.width)), positions, inv_freq)
        weights = self.scorer.weights_proj(x)
        return torch.ops.v4c.lightning_index(q, weights, rows, positions, lengths, self.ratio, self.top_k)


class CSACompressor(Compressor):
    """The overlapping compressor of a CSA layer, with the indexer that reads the same windows."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, config.csa_ratio, config.head_dim, overlap=True)
        self.indexer = Indexer(config)


class Attention(nn.Module):
    """One layer's attention; `kind` is ``sliding``, ``csa`` or ``hca``.

    With `hide_rows` set, compressed rows are neither made nor read, and only the sliding window is left: a control for
    measurements of what the rows are good for.
    """

    hide_rows = False

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.kind = config.attention_types[layer]
        self.heads, self.head_dim, self.groups = config.num_attention_heads, config.head_dim, config.o_groups
        self.eps, self.scale = config.rms_norm_eps, config.head_dim**-0.5
        self.rope_dims = config.qk_rope_head_dim
        self.kv: CacheDtype = "f32"  # what a compiled model's caches hold; rows are rounded as they do, in float32
        width = self.heads * self.head_dim
        self.q_a_proj = Linear(config.hidden_size, config.q_lora_rank)
        self.q_a_norm = RMSNorm(config.q_lora_rank, config.rms_norm_eps)
        self.q_b_proj = Linear(config.q_lora_rank, width)
        self.kv_proj = Linear(config.hidden_size, self.head_dim)
        self.kv_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.o_a_proj = Linear(width // self.groups, self.groups * config.o_lora_rank)
        self.o_b_proj = Linear(self.groups * config.o_lora_rank, config.hidden_size)
        self.sinks = nn.Parameter(torch.empty(self.heads))
        if self.kind == "csa":
            self.compressor: Compressor = CSACompressor(config)
        elif self.kind == "hca":
            self.compressor = Compressor(config, config.hca_ratio, config.head_dim, overlap=False)

    def forward(
        self, x: Tensor, positions: Tensor, lengths: Tensor, inv_freq: Tensor, caches: Caches
    ) -> tuple[Tensor, Caches]:
        """Attend from ``x [B, S, D]``; returns ``[B, S, D]`` and the updated caches."""
        q_residual = self.q_a_norm(self.q_a_proj(x))
        q = self.q_b_proj(q_residual).unflatten(-1, (self.heads, self.head_dim))
        q = rope(unweighted_rms_norm(q, self.eps), positions, inv_freq)
        kv = rope(self.kv_norm(self.kv_proj(x)).unsqueeze(2), positions, inv_freq).squeeze(2)
        kv = rounded_row(kv, self.kv, self.rope_dims)
        out, caches = self._attend(x, q, q_residual, kv, positions, lengths, inv_freq, caches)
        out = rope(out, positions, inv_freq, -1.0)
        return self._project(out), caches

    def _attend(
        self, x: Tensor, q: Tensor, q_residual: Tensor, kv: Tensor, positions: Tensor, lengths: Tensor,
        inv_freq: Tensor, caches: Caches,
    ) -> tuple[Tensor, Caches]:  # fmt: skip
        ops, where = torch.ops.v4c, (positions, lengths)
        if self.kind == "sliding" or self.hide_rows:
            out, window = ops.sliding_attention(q, kv, caches["window"], self.sinks, *where, self.scale)
            kept = {name: cache for name, cache in caches.items() if self.hide_rows and not name.startswith("engram")}
            return out, {**kept, "window": window}
        state = (caches["comp_kv"], caches["comp_gate"], caches["rows"])
        comp_kv, comp_gate, rows = self.compressor.compress(x, inv_freq, state, *where)
        rows = rounded_row(rows, self.kv, self.rope_dims)
        new = {"comp_kv": comp_kv, "comp_gate": comp_gate, "rows": rows}
        if isinstance(self.compressor, CSACompressor):
            indexer = self.compressor.indexer
            state = (caches["index_kv"], caches["index_gate"], caches["index_rows"])
            index_kv, index_gate, index_rows = indexer.compress(x, inv_freq, state, *where)
            index_rows = rounded_index_row(index_rows, self.kv)
            chosen = indexer.choose(x, q_residual, index_rows, inv_freq, *where)
            out, window = ops.csa_attention(q, kv, caches["window"], rows, chosen, self.sinks, *where, self.scale)
            new |= {"index_kv": index_kv, "index_gate": index_gate, "index_rows": index_rows}
        else:
            ratio = self.compressor.ratio
            out, window = ops.hca_attention(q, kv, caches["window"], rows, self.sinks, *where, ratio, self.scale)
        return out, {"window": window, **new}

    def _project(self, out: Tensor) -> Tensor:
        """Grouped output projection: each group of heads to `o_lora_rank`, then all groups to the hidden size."""
        grouped = out.unflatten(2, (self.groups, self.heads // self.groups)).flatten(3)
        weight = self.o_a_proj.weight.unflatten(0, (self.groups, -1)).transpose(1, 2)
        low_rank = torch.matmul(grouped.unsqueeze(-2), weight).squeeze(-2)
        return self.o_b_proj(low_rank.flatten(2))
