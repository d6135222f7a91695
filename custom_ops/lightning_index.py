"""Lightning indexer: the `top_k` compressed rows that each token's sparse attention reads, chosen by small heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from onnxscript import INT64, script
from onnxscript import opset23 as op
from onnxscript.onnx_types import FLOAT
from torch import Tensor

from .base import Attributes, TensorSpec, define
from .onnx_common import ReadyRows, TokenPositions, v4c
from .torch_common import blocks, ready_rows


def lightning_index(
    q: Tensor, weights: Tensor, index_rows: Tensor, positions: Tensor, lengths: Tensor, ratio: int, top_k: int
) -> Tensor:
    """Indices of the `top_k` best compressed rows of every token (DeepSeek-V4 paper, section on CSA).

    The score of row n is ``sum_h weights_h * relu(q_h . row_n) * I**-0.5 * J**-0.5``. Best first; equal scores go to
    the smaller index; -1 where fewer rows are ready. Only ready rows are read.

    Args:
        q: ``[B, S, J, I]`` float32, rotated indexer queries.
        weights: ``[B, S, J]`` float32, one per indexer head.
        index_rows: ``[B, N, I]`` float32, the indexer's compressed rows.
        positions, lengths: ``[B]`` int64, position of the first token and number of live tokens.
        ratio: tokens per compressed row.
        top_k: rows to choose.

    Returns:
        ``[B, S, top_k]`` int64.
    """
    batch, chunk, heads, _ = q.shape
    ready = ready_rows(positions, lengths, chunk, ratio)
    most = int(ready.max())
    keys = index_rows[:, :most]
    out = torch.full((batch, chunk, top_k), -1, device=q.device)
    row = torch.arange(most, device=q.device)
    for block in blocks(chunk, batch * heads * most):
        # I**-0.5 * J**-0.5 is left out: a positive factor common to all rows changes no order.
        scores = torch.einsum("bthi,bni->bthn", q[:, block], keys).relu_()
        scores = torch.einsum("bthn,bth->btn", scores, weights[:, block])
        scores.masked_fill_(row >= ready[:, block, None], -torch.inf)
        best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
        out[:, block, : best.shape[2]] = torch.where(best < ready[:, block, None], best, -1)
    return out


def _shapes(inputs: Sequence[TensorSpec], attributes: Attributes) -> tuple[TensorSpec, ...]:
    batch, chunk = inputs[0].shape[:2]
    return (TensorSpec((batch, chunk, attributes["top_k"]), "int64"),)


@script(v4c, default_opset=op)
def LightningIndex(
    q: FLOAT[...],
    weights: FLOAT[...],
    index_rows: FLOAT[...],
    positions: INT64[...],
    lengths: INT64[...],
    ratio: int,
    top_k: int,
) -> INT64[...]:
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    two = op.Constant(value_ints=[2])
    nothing = op.Constant(value_float=float("-inf"))
    ready, most = ReadyRows(q, positions, lengths, ratio=ratio)
    keys = op.Unsqueeze(op.Transpose(op.Slice(index_rows, zero, most, one), perm=[0, 2, 1]), one)
    # I**-0.5 * J**-0.5 is left out: a positive factor common to all rows changes no order.
    scores = op.MatMul(op.Unsqueeze(weights, two), op.Relu(op.MatMul(q, keys)))
    limit = op.Unsqueeze(ready, two)
    row = op.Range(op.Constant(value_int=0), op.Squeeze(most), op.Constant(value_int=1))
    scores = op.Where(op.Less(row, limit), op.Squeeze(scores, two), nothing)
    k = op.Unsqueeze(op.Constant(value_int=top_k), zero)
    short = op.Concat(zero, op.Max(op.Sub(k, most), zero), axis=0)
    _, best = op.TopK(op.Pad(scores, short, nothing, two), k, axis=-1)  # TopK gives ties the smaller index first
    return op.Where(op.Less(best, limit), best, op.Constant(value_int=-1))


LIGHTNING_INDEX = define(
    "LightningIndex",
    lightning_index,
    inputs=("q", "weights", "index_rows", "positions", "lengths"),
    outputs=("indices",),
    attributes={"ratio": int, "top_k": int},
    shape_rule=_shapes,
    functions=(LightningIndex, ReadyRows, TokenPositions),
)
