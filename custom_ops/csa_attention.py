"""Compressed sparse attention (CSA): the sliding window and the compressed rows that the lightning indexer chose."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from onnxscript import INT64, script
from onnxscript import opset23 as op
from onnxscript.onnx_types import FLOAT
from torch import Tensor

from .attention_common import Attend, attend
from .base import Attributes, TensorSpec, define
from .onnx_common import RingIndices, v4c
from .torch_common import blocks, ring_history, ring_write


def csa_attention(
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
    """Multi-query attention over the last W raw rows and chosen compressed rows (DeepSeek-V4 paper, section 2.3).

    Args:
        q: ``[B, S, H, C]`` float32, rotated.
        kv: ``[B, S, C]`` float32, rotated; each row is key and value.
        window: ``[B, W, C]`` ring of the last W rows, slot = position mod W.
        rows: ``[B, N, C]`` compressed rows, those of this chunk written; N is at least 1.
        indices: ``[B, S, k]`` int64, the rows each token reads; -1 stands for none.
        sinks: ``[H]`` float32 logits that stand in the softmax denominator only.
        positions, lengths: ``[B]`` int64, position of the first token and number of live tokens.
        scale: factor on ``q . key``.

    Returns:
        ``[B, S, H, C]`` float32 and the updated window.
    """
    batch, chunk, _, width = q.shape
    size = window.shape[1]
    history, history_positions = ring_history(window, kv, positions)
    near = torch.arange(chunk, device=q.device)[:, None] + torch.arange(1, size + 1, device=q.device)
    row = torch.arange(batch, device=q.device)[:, None, None]
    out = torch.empty_like(q)
    for block in blocks(chunk, batch * (size + indices.shape[2]) * width):
        chosen = indices[:, block]
        keys = torch.cat([history[:, near[block]], rows[row, chosen.clamp(min=0)]], dim=2)
        visible = torch.cat([history_positions[:, near[block]] >= 0, chosen >= 0], dim=2)
        out[:, block] = attend(q[:, block], keys, visible, sinks, scale)
    return out, ring_write(window, kv, positions, lengths)


def _shapes(inputs: Sequence[TensorSpec], attributes: Attributes) -> tuple[TensorSpec, ...]:
    return inputs[0], inputs[2]


@script(v4c, default_opset=op)
def CompressedSparseAttention(
    q: FLOAT[...],
    kv: FLOAT[...],
    window: FLOAT[...],
    rows: FLOAT[...],
    indices: INT64[...],
    sinks: FLOAT[...],
    positions: INT64[...],
    lengths: INT64[...],
    scale: float,
) -> tuple[FLOAT[...], FLOAT[...]]:
    zero = op.Constant(value_int=0)
    one = op.Constant(value_int=1)
    three = op.Constant(value_ints=[3])
    slots, history_positions, source, target = RingIndices(window, kv, positions, lengths)
    history = op.Concat(op.GatherND(window, slots, batch_dims=1), kv, axis=1)

    # Token j sees the history rows j + 1 ... j + W: gathered per token, as the chosen rows are.
    token = op.Range(zero, op.Squeeze(op.Shape(kv, start=1, end=2)), one)
    step = op.Range(one, op.Add(op.Squeeze(op.Shape(window, start=1, end=2)), one), one)
    near = op.Add(op.Unsqueeze(token, op.Constant(value_ints=[1])), step)
    chosen = op.GatherND(rows, op.Unsqueeze(op.Max(indices, zero), three), batch_dims=1)
    keys = op.Concat(op.Gather(history, near, axis=1), chosen, axis=2)
    known = op.Concat(op.Gather(history_positions, near, axis=1), indices, axis=2)
    visible = op.GreaterOrEqual(known, zero)
    clean = op.Where(op.Unsqueeze(visible, three), keys, op.Constant(value_float=0.0))
    out = Attend(q, clean, visible, sinks, scale=scale)
    return out, op.ScatterND(window, target, op.GatherND(history, source))


CSA_ATTENTION = define(
    "CompressedSparseAttention",
    csa_attention,
    inputs=("q", "kv", "window", "rows", "indices", "sinks", "positions", "lengths"),
    outputs=("out", "window"),
    attributes={"scale": float},
    shape_rule=_shapes,
    functions=(CompressedSparseAttention, RingIndices, Attend),
    writes={"window": "window"},
)
