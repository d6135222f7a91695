"""State of a layer as pure functions of the whole ring: every slot asks which token it should hold now.

The same results as `v4c.custom_ops.torch_common` and `kv_compress`, without `nonzero` and scatter, whose shapes and
order depend on data: here each slot and each compressed row is gathered, which is one linalg operation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .rotation import rotate


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index [B, ...]`` of ``x [B, R, C]`` (``[B, R]``), per batch row: ``[B, ..., C]`` (``[B, ...]``)."""
    first = torch.arange(x.shape[0]) * x.shape[1]
    for _ in range(index.ndim - 1):
        first = first.unsqueeze(-1)
    return x.flatten(0, 1)[first + index]  # one index tensor: torch-mlir lowers no pair of them that broadcasts


def history(ring: Tensor, new: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The ring ``[B, R, ...]`` oldest first, then the chunk ``[B, S, ...]``, and the position of each of these rows.

    Rows at positions below 0 were never written and hold anything, NaN included.
    """
    size, chunk = ring.shape[1], new.shape[1]
    slots = (positions[:, None] + torch.arange(size)) % size  # position - size, and never negative
    where = positions[:, None] - size + torch.arange(size + chunk)
    return torch.cat([take(ring, slots), new], dim=1), where


def updated(ring: Tensor, new: Tensor, positions: Tensor, lengths: Tensor) -> Tensor:
    """The ring ``[B, R, ...]`` after the live tokens of the chunk ``[B, S, ...]``, slot = position mod R."""
    size = ring.shape[1]
    last = (positions + lengths - 1)[:, None]
    # The latest position before the end that belongs to the slot; that of an older chunk where it is not in this one.
    back = (last + size - torch.arange(size)) % size
    token = last - back - positions[:, None]
    live = token >= 0
    taken = take(new, token.clamp(min=0))
    return torch.where(live.unsqueeze(-1) if ring.ndim == 3 else live, taken, ring)


def compressed(
    kv: Tensor,
    gate: Tensor,
    bias: Tensor,
    norm: Tensor,
    inv_freq: Tensor,
    state_kv: Tensor,
    state_gate: Tensor,
    rows: Tensor,
    positions: Tensor,
    lengths: Tensor,
    ratio: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `v4c.custom_ops.kv_compress.kv_compress`; a window beyond the capacity of `rows` is dropped."""
    chunk, ring, width = kv.shape[1], state_kv.shape[1], rows.shape[2]
    halves = kv.shape[2] // width
    start, end = positions[:, None], (positions + lengths)[:, None]
    first = start // ratio
    # At most this many windows end in the chunk; those of a row are `first` and on.
    window = first + torch.arange((chunk + ratio - 1) // ratio)

    slot = torch.arange(ring)
    # Slot k is k - (Q - 1) tokens from the window's last; history row h is position start - Q + h.
    position = (window * ratio + (ratio - ring)).unsqueeze(-1) + slot
    index = (position - (start - ring).unsqueeze(-1)).clamp(max=ring + chunk - 1)
    missing = (position < 0).unsqueeze(-1)
    history_kv, _ = history(state_kv, kv, positions)
    history_gate, _ = history(state_gate, gate, positions)
    own = torch.where(missing, 0.0, _half(take(history_kv, index), ratio, halves, width))
    gates = _half(take(history_gate, index), ratio, halves, width)
    gates = gates + torch.cat([bias[:, i * width : (i + 1) * width] for i in range(halves)], dim=0)
    share = torch.where(missing, -torch.inf, gates).softmax(2)
    pooled = (own * share).sum(2)
    normed = pooled * torch.rsqrt(pooled.square().mean(-1, keepdim=True) + eps) * norm
    made = rotate(normed, window * ratio, inv_freq, 1.0)

    row = torch.arange(rows.shape[1])
    which = row - first
    live = (which >= 0) & ((row + 1) * ratio <= end)
    taken = take(made, which.clamp(min=0, max=window.shape[1] - 1))
    return (
        updated(state_kv, kv, positions, lengths),
        updated(state_gate, gate, positions, lengths),
        torch.where(live.unsqueeze(-1), taken, rows),
    )


def _half(wide: Tensor, ratio: int, halves: int, width: int) -> Tensor:
    """Of slot k of ``wide [B, J, Q, halves * C]``, the k // ratio-th C columns: ``[B, J, Q, C]``."""
    parts = [wide[:, :, i * ratio : (i + 1) * ratio, i * width : (i + 1) * width] for i in range(halves)]
    return torch.cat(parts, dim=2)
