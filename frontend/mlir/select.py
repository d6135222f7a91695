"""Choosing the k best of many scores in plain tensor arithmetic: no sort, no loop, no shape that depends on data.

MLIR's upstream dialects have neither a sort nor a scan, and torch-mlir gives its own (`tm_tensor`), which other
compilers do not read. Here the choice is made by comparing and counting, which is linalg.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 128  # of the running count
_RADIX_BITS = 4  # of one step of the search for the k-th largest key
_INDEX_BITS = 26  # room for 67 M choices in a key
_LOWEST = -(2**59)  # below every key
_SCALE_UP = (64, 64, 32, 16, 8, 4, 2, 1)  # 2**-191 and below: no float32
_SCALE_DOWN = (64, 32, 16, 8, 4, 2, 1)


def first_of_few(scores: Tensor, top_k: int) -> Tensor:
    """Indices of the `top_k` largest of ``scores [..., E]``, best first; of equal ones the smaller index is first.

    Every score is compared with every other, so E should be small: experts, not compressed rows.
    """
    choice = torch.arange(scores.shape[-1])
    other = scores.unsqueeze(-2)
    ahead = (other > scores.unsqueeze(-1)) | ((other == scores.unsqueeze(-1)) & (choice < choice[:, None]))
    rank = ahead.to(torch.int64).sum(-1)
    placed = rank.unsqueeze(-2) == torch.arange(top_k)[:, None]
    return (placed.to(torch.int64) * choice).sum(-1)


def first_of_many(scores: Tensor, ready: Tensor, top_k: int) -> Tensor:
    """The `top_k` largest of the first ``ready [B, S]`` of ``scores [B, S, N]``, as indices ``[B, S, top_k]``.

    By ascending index, -1 where fewer are ready; of equal scores the smaller index is chosen. Scores are finite.
    """
    row = torch.arange(scores.shape[2])
    # Keys that differ even where scores do not: the score's order, then the index from the end.
    keys = _ordered(scores) * 2**_INDEX_BITS + (2**_INDEX_BITS - 1 - row)
    keys = torch.where(row < ready.unsqueeze(-1), keys, _LOWEST)
    chosen = (keys >= _kth_largest(keys, top_k).unsqueeze(-1)) & (keys > _LOWEST)
    before = _running_count(chosen)
    # The j-th chosen index is the number of rows up to which at most j were chosen; N where there are no more.
    slot = torch.arange(top_k)
    index = (before.unsqueeze(2) <= slot[:, None, None]).to(torch.int64).sum((-2, -1))
    return torch.where(index < scores.shape[2], index, -1)


def _ordered(x: Tensor) -> Tensor:
    """Integers of less than 2**33 that order as the finite float32 `x` do: exponent, then mantissa; exact.

    Reinterpreting the bits would be shorter, but torch-mlir lowers no such cast. Scaling by powers of two is exact.
    """
    size = x.abs()
    exponent = torch.zeros_like(x, dtype=torch.int64)
    for step in _SCALE_DOWN:
        large = size >= 2.0**step
        size = torch.where(large, size * 2.0**-step, size)
        exponent = exponent + large.to(torch.int64) * step
    for step in _SCALE_UP:
        small = size < 2.0 ** (1 - step)
        size = torch.where(small, size * 2.0**step, size)
        exponent = exponent - small.to(torch.int64) * step
    # Now 1 <= size < 2, or 0 for zero, whose exponent is the lowest.
    key = (exponent + sum(_SCALE_UP)) * 2**24 + (size * 2.0**23).to(torch.int64)
    return torch.where(x < 0, -key, key)


def _kth_largest(keys: Tensor, k: int) -> Tensor:
    """The k-th largest of distinct ``keys [B, S, N]`` in (-2**59, 2**59), ``[B, S]``; -2**59 if there are fewer.

    Found digit by digit: the largest value that at least `k` keys reach.
    """
    found = torch.full_like(keys[:, :, 0], _LOWEST)
    digits = torch.arange(1, 2**_RADIX_BITS)
    for shift in range(60 - _RADIX_BITS, -1, -_RADIX_BITS):
        steps = digits * 2**shift
        reached = keys.unsqueeze(2) >= (found.unsqueeze(-1) + steps).unsqueeze(-1)
        enough = reached.to(torch.int64).sum(-1) >= k
        found = found + enough.to(torch.int64).sum(-1) * 2**shift
    return found


def _running_count(chosen: Tensor) -> Tensor:
    """How many of ``chosen [B, S, N]`` are set up to and including each place, ``[B, S, ceil(N / 128), 128]``.

    Places past the end hold the total. Within blocks of 128 by comparing all pairs, then the same over the blocks.
    """
    total = chosen.shape[2]
    place = torch.arange(_BLOCK)
    block = torch.arange((total + _BLOCK - 1) // _BLOCK)
    index = block[:, None] * _BLOCK + place
    blocked = chosen.to(torch.int64)[:, :, index.clamp(max=total - 1)] * (index < total).to(torch.int64)
    within = (blocked.unsqueeze(-2) * (place <= place[:, None]).to(torch.int64)).sum(-1)
    count = blocked.sum(-1)
    before = (count.unsqueeze(-2) * (block < block[:, None]).to(torch.int64)).sum(-1)
    return within + before.unsqueeze(-1)
