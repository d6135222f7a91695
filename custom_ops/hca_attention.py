"""Heavily compressed attention (HCA): the sliding window and every compressed row that is ready."""

from __future__ import annotations

from collections.abc import Sequence

from onnxscript import INT64, script
from onnxscript import opset23 as op
from onnxscript.onnx_types import FLOAT
from torch import Tensor

from .attention_common import Attend, AttendShared, WindowVisible, attend_shared
from .base import Attributes, TensorSpec, define
from .onnx_common import ReadyRows, RingIndices, TokenPositions, v4c


def hca_attention(
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
    """Multi-query attention over the last W raw rows and all ready compressed rows (DeepSeek-V4 paper, section 2.3).

    Args:
        q: ``[B, S, H, C]`` float32, rotated.
        kv: ``[B, S, C]`` float32, rotated; each row is key and value.
        window: ``[B, W, C]`` ring of the last W rows, slot = position mod W.
        rows: ``[B, N, C]`` compressed rows, those of this chunk written; only ready ones are read.
        sinks: ``[H]`` float32 logits that stand in the softmax denominator only.
        positions, lengths: ``[B]`` int64, position of the first token and number of live tokens.
        ratio: tokens per compressed row; row w is ready from position ``(w + 1) * ratio - 1``.
        scale: factor on ``q . key``.

    Returns:
        ``[B, S, H, C]`` float32 and the updated window.
    """
    return attend_shared(q, kv, window, rows, sinks, positions, lengths, ratio, scale)


def _shapes(inputs: Sequence[TensorSpec], attributes: Attributes) -> tuple[TensorSpec, ...]:
    return inputs[0], inputs[2]


@script(v4c, default_opset=op)
def HeavilyCompressedAttention(
    q: FLOAT[...],
    kv: FLOAT[...],
    window: FLOAT[...],
    rows: FLOAT[...],
    sinks: FLOAT[...],
    positions: INT64[...],
    lengths: INT64[...],
    ratio: int,
    scale: float,
) -> tuple[FLOAT[...], FLOAT[...]]:
    slots, history_positions, source, target = RingIndices(window, kv, positions, lengths)
    history = op.Concat(op.GatherND(window, slots, batch_dims=1), kv, axis=1)
    ready, most = ReadyRows(q, positions, lengths, ratio=ratio)
    row = op.Range(op.Constant(value_int=0), op.Squeeze(most), op.Constant(value_int=1))
    complete = op.Less(row, op.Unsqueeze(ready, op.Constant(value_ints=[2])))
    visible = op.Concat(WindowVisible(window, history_positions), complete, axis=2)
    compressed = op.Slice(rows, op.Constant(value_ints=[0]), most, op.Constant(value_ints=[1]))
    out = AttendShared(q, op.Concat(history, compressed, axis=1), visible, sinks, scale=scale)
    return out, op.ScatterND(window, target, op.GatherND(history, source))


HCA_ATTENTION = define(
    "HeavilyCompressedAttention",
    hca_attention,
    inputs=("q", "kv", "window", "rows", "sinks", "positions", "lengths"),
    outputs=("out", "window"),
    attributes={"ratio": int, "scale": float},
    shape_rule=_shapes,
    functions=(
        HeavilyCompressedAttention, RingIndices, ReadyRows, TokenPositions, WindowVisible, AttendShared, Attend,
    ),
    writes={"window": "window"},
)  # fmt: skip
