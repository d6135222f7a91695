"""The attention ops and the lightning indexer over whole caches: what a token may not see is masked, not sliced off.

The torch references slice the compressed rows at the longest row that is ready, a size that depends on data.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .select import first_of_many
from .state import history, take, updated


def sliding(
    q: Tensor, kv: Tensor, window: Tensor, sinks: Tensor, positions: Tensor, lengths: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """As `v4c.custom_ops.sliding_attention.sliding_attention`."""
    keys, seen = _window(kv, window, positions)
    out = _attend([(_scores(q, keys), seen, keys)], sinks, scale)
    return out, updated(window, kv, positions, lengths)


def heavily_compressed(
    q: Tensor,
    kv: Tensor,
    window: Tensor,
    rows: Tensor,
    sinks: Tensor,
    positions: Tensor,
    lengths: Tensor,
    ratio: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """As `v4c.custom_ops.hca_attention.hca_attention`; time and memory follow the capacity of `rows`."""
    keys, seen = _window(kv, window, positions)
    row = torch.arange(rows.shape[1])
    complete = (row + 1) * ratio <= (positions + lengths)[:, None]
    rows = torch.where(complete.unsqueeze(-1), rows, 0.0)
    ready = row < _ready(q, positions, lengths, ratio).unsqueeze(-1)
    out = _attend([(_scores(q, keys), seen, keys), (_scores(q, rows), ready, rows)], sinks, scale)
    return out, updated(window, kv, positions, lengths)


def compressed_sparse(
    q: Tensor,
    kv: Tensor,
    window: Tensor,
    rows: Tensor,
    indices: Tensor,
    sinks: Tensor,
    positions: Tensor,
    lengths: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """As `v4c.custom_ops.csa_attention.csa_attention`: the window's keys are shared, the chosen ones each token's."""
    keys, seen = _window(kv, window, positions)
    chosen = indices >= 0
    own = torch.where(chosen.unsqueeze(-1), take(rows, indices.clamp(min=0)), 0.0)
    out = _attend([(_scores(q, keys), seen, keys), (torch.matmul(q, own.transpose(2, 3)), chosen, own)], sinks, scale)
    return out, updated(window, kv, positions, lengths)


def lightning_index(
    q: Tensor, weights: Tensor, index_rows: Tensor, positions: Tensor, lengths: Tensor, ratio: int, top_k: int
) -> Tensor:
    """As `v4c.custom_ops.lightning_index.lightning_index`, but by ascending index: attention asks for no order."""
    ready = _ready(q, positions, lengths, ratio)
    row = torch.arange(index_rows.shape[1])
    rows = torch.where((row < ready[:, -1:]).unsqueeze(-1), index_rows, 0.0)
    scores = (_scores(q, rows).relu() * weights.unsqueeze(-1)).sum(2)
    return first_of_many(scores, ready, top_k)


def _ready(q: Tensor, positions: Tensor, lengths: Tensor, ratio: int) -> Tensor:
    """Compressed rows each token of ``q [B, S, ...]`` may read, ``[B, S]``; the last token may read the most."""
    seen = positions[:, None] + torch.arange(1, q.shape[1] + 1)
    return torch.minimum(seen, (positions + lengths)[:, None]) // ratio


def _window(kv: Tensor, window: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The sliding window before the chunk, then the chunk, ``[B, W + S, C]``, and who sees what, ``[B, S, W + S]``."""
    size, chunk = window.shape[1], kv.shape[1]
    keys, where = history(window, kv, positions)
    keys = torch.where((where >= 0).unsqueeze(-1), keys, 0.0)
    key, token = torch.arange(size + chunk), torch.arange(chunk)[:, None]
    near = (key > token) & (key <= token + size)  # token j is row W + j and sees the last W, its own included
    return keys, near & (where >= 0).unsqueeze(1)


def _scores(q: Tensor, keys: Tensor) -> Tensor:
    """``q [B, S, H, C]`` times ``keys [B, n, C]`` that all tokens share: ``[B, S, H, n]``."""
    return torch.matmul(q, keys.transpose(1, 2).unsqueeze(1))


def _attend(groups: list[tuple[Tensor, Tensor, Tensor]], sinks: Tensor, scale: float) -> Tensor:
    """One softmax with a sink per head over several groups of keys.

    Args:
        groups: scores ``[B, S, H, n]``, who sees what ``[B, S, n]``, and keys ``[B, n, C]`` or ``[B, S, n, C]``.
        sinks: ``[H]`` logits that stand in the denominator only.
        scale: factor on the scores.

    Returns:
        ``[B, S, H, C]``.
    """
    masked = [torch.where(visible.unsqueeze(2), scores * scale, -torch.inf) for scores, visible, _ in groups]
    sink = sinks.unsqueeze(-1)
    most = sink.expand(*masked[0].shape[:3], 1)
    for scores in masked:
        most = torch.maximum(most, scores.amax(-1, keepdim=True))
    weights = [torch.exp(scores - most) for scores in masked]
    total = torch.exp(sink - most)
    for weight in weights:
        total = total + weight.sum(-1, keepdim=True)
    keys = [rows if rows.ndim == 4 else rows.unsqueeze(1) for _, _, rows in groups]
    products = [torch.matmul(weight, rows) for weight, rows in zip(weights, keys, strict=True)]
    return sum(products[1:], products[0]) / total
