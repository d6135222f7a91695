"""Engram hash: every token's n-gram suffixes, n = 2..G, hashed to rows of the layer's embedding table.

Addresses depend on token ids alone, so a runtime can fetch the rows before the layer that needs them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from onnxscript import INT64, script
from onnxscript import opset23 as op
from onnxscript.values import Opset
from torch import Tensor

from .base import DOMAIN, OPSET_VERSION, Attributes, TensorSpec, define
from .onnx_common import RingIndices
from .torch_common import ring_history, ring_write

v4c = Opset(DOMAIN, OPSET_VERSION)


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
    """Multiplicative-XOR hash of compressed token ids (Engram paper, section 2.2).

    hash_n = XOR over k < n of id[t - k] * multiplier[k], in int64 that wraps around; the address of a head is
    hash_n mod its prime (never negative), plus the head's offset. Ids before position 0 are that of `pad_id`.

    Args:
        input_ids: ``[B, S]`` int64.
        lookup: ``[V]`` int64, compressed id of each token id.
        multipliers: ``[G]`` int64, G the longest n-gram.
        primes: ``[T]`` int64, positive; T = (G - 1) * heads, all heads of n = 2 first.
        offsets: ``[T]`` int64, first table row of each head.
        history: ``[B, G - 1]`` int64 ring of compressed ids, slot = position mod (G - 1).
        positions: ``[B]`` int64, position of each row's first token.
        lengths: ``[B]`` int64, live tokens of each row.
        pad_id: token id that stands for whatever comes before the text.

    Returns:
        addresses ``[B, S, T]`` int64 and the new history.
    """
    chunk, size = input_ids.shape[1], history.shape[1]
    ids = lookup[input_ids]
    rows, row_positions = ring_history(history, ids, positions)
    rows = torch.where(row_positions < 0, lookup[pad_id], rows)
    mix = ids * multipliers[0]
    hashes = []
    for back in range(1, size + 1):
        mix = mix ^ (rows[:, size - back : size - back + chunk] * multipliers[back])
        hashes.append(mix)
    # [B, S, G - 1, 1] mod [G - 1, heads]; remainder takes the sign of the divisor.
    spread = torch.stack(hashes, dim=2).unsqueeze(-1).remainder(primes.view(size, -1))
    return spread.flatten(2) + offsets, ring_write(history, ids, positions, lengths)


def _shapes(inputs: Sequence[TensorSpec], attributes: Attributes) -> tuple[TensorSpec, ...]:
    return TensorSpec((*inputs[0].shape, inputs[3].shape[0]), "int64"), inputs[5]


@script(v4c, default_opset=op)
def EngramHash(
    input_ids: INT64[...],
    lookup: INT64[...],
    multipliers: INT64[...],
    primes: INT64[...],
    offsets: INT64[...],
    history: INT64[...],
    positions: INT64[...],
    lengths: INT64[...],
    pad_id: int,
) -> tuple[INT64[...], INT64[...]]:
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    two = op.Constant(value_ints=[2])
    last = op.Constant(value_ints=[-1])
    slots, row_positions, source, target = RingIndices(history, input_ids, positions, lengths)
    # GatherND, not Gather: shape inference would try to propagate the lookup's data, which may be external.
    ids = op.GatherND(lookup, op.Unsqueeze(input_ids, two))
    rows = op.Concat(op.GatherND(history, slots, batch_dims=1), ids, axis=1)
    history_out = op.ScatterND(history, target, op.GatherND(rows, source))

    pad = op.GatherND(lookup, op.Unsqueeze(op.Constant(value_int=pad_id), zero))
    known = op.Unsqueeze(op.Where(op.Less(row_positions, zero), pad, rows), two)
    size = op.Shape(history, start=1)
    chunk = op.Shape(input_ids, start=1)
    mix = op.Mul(op.Unsqueeze(ids, two), op.Gather(multipliers, zero))
    hashes = mix
    orders = op.Squeeze(size)
    for i in range(orders):
        back = op.Add(i, one)
        start = op.Sub(size, back)
        shifted = op.Slice(known, start, op.Add(start, chunk), one)
        mix = op.BitwiseXor(mix, op.Mul(shifted, op.Gather(multipliers, back)))
        hashes = op.Concat(hashes, mix, axis=2)
    # The first column is the one-gram the loop starts from. Mod with fmod=0 takes the sign of the divisor.
    ngrams = op.Unsqueeze(op.Slice(hashes, one, op.Add(size, one), two), last)
    spread = op.Mod(ngrams, op.Reshape(primes, op.Concat(size, last, axis=0)))
    addresses = op.Add(op.Reshape(spread, op.Constant(value_ints=[0, 0, -1])), offsets)
    return addresses, history_out


ENGRAM_HASH = define(
    "EngramHash",
    engram_hash,
    inputs=("input_ids", "lookup", "multipliers", "primes", "offsets", "history", "positions", "lengths"),
    outputs=("addresses", "history"),
    attributes={"pad_id": int},
    shape_rule=_shapes,
    functions=(EngramHash, RingIndices),
    writes={"history": "history"},
)
