"""Engram's two ops with state, on the ring functions of `state`: the arithmetic is that of the torch references."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .state import history as ring_history
from .state import updated


def engram_hash(
    input_ids: Tensor,
    lookup: Tensor,
    multipliers: Tensor,
    primes: Tensor,
    offsets: Tensor,
    history: Tensor,
    positions: Tensor,
    lengths: Tensor,
    pad_id: int,
) -> tuple[Tensor, Tensor]:
    """As `v4c.custom_ops.engram_hash.engram_hash`."""
    chunk, size = input_ids.shape[1], history.shape[1]
    heads = primes.shape[0] // size
    ids = lookup[input_ids]
    rows, where = ring_history(history, ids, positions)
    rows = torch.where(where < 0, lookup[pad_id], rows)
    mix = ids * multipliers[0]
    addresses = []
    for back in range(1, size + 1):
        mix = mix ^ (rows[:, size - back : size - back + chunk] * multipliers[back])
        addresses.append(mix.unsqueeze(-1).remainder(primes[(back - 1) * heads : back * heads]))
    return torch.cat(addresses, dim=2) + offsets, updated(history, ids, positions, lengths)


def engram_gate_conv(
    keys: Tensor,
    value: Tensor,
    streams: Tensor,
    key_norm: Tensor,
    stream_norm: Tensor,
    conv_norm: Tensor,
    conv_weight: Tensor,
    conv_state: Tensor,
    positions: Tensor,
    lengths: Tensor,
    dilation: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """As `v4c.custom_ops.engram_gate_conv.engram_gate_conv`."""
    chunk, count, width = value.shape[1], streams.shape[2], value.shape[-1]
    dot = (_rms(keys, key_norm, eps) * _rms(streams, stream_norm, eps)).sum(-1, keepdim=True) / width**0.5
    gate = torch.sigmoid(dot.sign() * dot.abs().clamp_min(1e-6).sqrt())
    gated = gate * value.unsqueeze(2)
    normed = _rms(gated, conv_norm, eps)
    new = torch.cat([normed[:, :, i] for i in range(count)], dim=2)
    rows, where = ring_history(conv_state, new, positions)
    rows = torch.where(where.unsqueeze(-1) < 0, 0.0, rows)
    conv = torch.zeros_like(new)
    for tap in range(conv_weight.shape[1]):
        conv = conv + rows[:, tap * dilation : tap * dilation + chunk] * conv_weight[:, tap]
    conv = functional.silu(conv)
    apart = torch.stack([conv[:, :, i * width : (i + 1) * width] for i in range(count)], dim=2)
    return streams + gated + apart, updated(conv_state, new, positions, lengths)


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
