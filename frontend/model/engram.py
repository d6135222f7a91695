"""Engram, conditional memory by n-gram lookup (arXiv 2601.07372), added to the streams before the attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from v4c.frontend.config import EngramConfig, ModelConfig

from .attention import Caches
from .layers import Linear


class Weight(nn.Module):
    """A bare parameter called ``weight``: a norm's or a convolution's, read by a custom op."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*shape))


class Engram(nn.Module):
    """Hash the last n-grams, look their rows up, gate them by the streams and convolve along time."""

    multipliers: Tensor
    primes: Tensor
    offsets: Tensor

    def __init__(self, config: ModelConfig, engram: EngramConfig, layer: int) -> None:
        super().__init__()
        streams, hidden, width = config.hc_mult, config.hidden_size, engram.embedding_width
        self.embedding = Weight(int(sum(engram.primes(layer))), engram.embed_dim)
        self.key_proj = Linear(width, streams * hidden)
        self.value_proj = Linear(width, hidden)
        self.key_norm, self.stream_norm, self.conv_norm = (Weight(streams, hidden) for _ in range(3))
        self.conv = Weight(streams * hidden, engram.kernel_size)
        for name, size in (
            ("multipliers", engram.max_ngram),
            ("primes", engram.num_addresses),
            ("offsets", engram.num_addresses),
        ):
            self.register_buffer(name, torch.empty(size, dtype=torch.int64))
        self.streams, self.hidden, self.eps = streams, hidden, config.rms_norm_eps
        self.pad_id, self.dilation = engram.pad_id, engram.dilation

    def forward(
        self, streams: Tensor, input_ids: Tensor, lookup: Tensor, positions: Tensor, lengths: Tensor, caches: Caches
    ) -> tuple[Tensor, Caches]:
        """Add the memory's contribution to ``streams [B, S, M, D]``; `lookup` maps token ids to compressed ids."""
        ops = torch.ops.v4c
        addresses, ids = ops.engram_hash(
            input_ids, lookup, self.multipliers, self.primes, self.offsets, caches["engram_ids"],
            positions, lengths, self.pad_id,
        )  # fmt: skip
        embedding = ops.engram_lookup(self.embedding.weight, addresses)
        keys = self.key_proj(embedding).unflatten(-1, (self.streams, self.hidden))
        streams, conv = ops.engram_gate_conv(
            keys, self.value_proj(embedding), streams, self.key_norm.weight, self.stream_norm.weight,
            self.conv_norm.weight, self.conv.weight, caches["engram_conv"], positions, lengths, self.dilation, self.eps,
        )  # fmt: skip
        return streams, {"engram_ids": ids, "engram_conv": conv}
