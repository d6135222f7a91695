"""What several torch references share: token positions, ready compressed rows, ring state with lengths."""

from __future__ import annotations

import torch
from torch import Tensor


def token_positions(positions: Tensor, chunk: int) -> Tensor:
    """Position of every token of the chunk, ``[B, chunk]`` int64, from ``positions [B]``."""
    return positions[:, None] + torch.arange(chunk, device=positions.device)


def ready_rows(positions: Tensor, lengths: Tensor, chunk: int, ratio: int) -> Tensor:
    """Compressed rows each token of the chunk may read, ``[B, chunk]`` int64.

    A row is ready once its window is complete; padding tokens are held to the rows that live tokens completed.
    """
    seen = token_positions(positions, chunk) + 1
    return torch.minimum(seen, (positions + lengths)[:, None]) // ratio


def ring_history(ring: Tensor, new: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The rows before the chunk, oldest first, followed by the chunk.

    Args:
        ring: ``[B, R, ...]``, slot = position mod R.
        new: ``[B, S, ...]``, the chunk's rows.
        positions: ``[B]`` int64.

    Returns:
        ``[B, R + S, ...]`` and the position of each row ``[B, R + S]``. Rows at positions below 0 were never written
        and hold anything, NaN included: replace them, do not multiply them by 0.
    """
    size, chunk = ring.shape[1], new.shape[1]
    history_positions = token_positions(positions - size, size + chunk)
    row = torch.arange(len(ring), device=ring.device)[:, None]
    ordered = ring[row, history_positions[:, :size] % size]
    return torch.cat([ordered, new], dim=1), history_positions


def ring_write(ring: Tensor, new: Tensor, positions: Tensor, lengths: Tensor) -> Tensor:
    """A copy of `ring` ``[B, R, ...]`` with the last R live rows of `new` ``[B, S, ...]`` at slot = position mod R."""
    size, chunk = ring.shape[1], new.shape[1]
    token = torch.arange(chunk, device=ring.device)
    kept = (token < lengths[:, None]) & (token >= lengths[:, None] - size)
    row, token = kept.nonzero(as_tuple=True)
    out = ring.clone()
    out[row, (positions[row] + token) % size] = new[row, token]
    return out


def blocks(chunk: int, per_token: int, limit: int | None = None) -> list[slice]:
    """Slices that cover `chunk` tokens, each of about 4 M elements (and at most `limit` tokens).

    Args:
        chunk: tokens to cover.
        per_token: elements of the largest temporary tensor for one token.
        limit: most tokens in one slice.
    """
    size = max(1, (1 << 22) // max(per_token, 1))
    size = size if limit is None else min(size, limit)
    return [slice(start, min(start + size, chunk)) for start in range(0, chunk, size)]
