"""Sliding-window attention: the attention of layers that compress nothing."""

from __future__ import annotations

from collections.abc import Sequence

from onnxscript import INT64, script
from onnxscript import opset23 as op
from onnxscript.onnx_types import FLOAT
from torch import Tensor

from .attention_common import Attend, AttendShared, WindowVisible, attend_shared
from .base import Attributes, TensorSpec, define
from .onnx_common import RingIndices, v4c


def sliding_attention(
    q: Tensor, kv: Tensor, window: Tensor, sinks: Tensor, positions: Tensor, lengths: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Multi-query attention with sinks over the last W rows, the token's own included (DeepSeek-V4 paper, section 2.3).

    Args:
        q: ``[B, S, H, C]`` float32, rotated.
        kv: ``[B, S, C]`` float32, rotated; each row is key and value.
        window: ``[B, W, C]`` ring of the last W rows, slot = position mod W.
        sinks: ``[H]`` float32 logits that stand in the softmax denominator only.
        positions, lengths: ``[B]`` int64, position of the first token and number of live tokens.
        scale: factor on ``q . key``.

    Returns:
        ``[B, S, H, C]`` float32 and the updated window.
    """
    return attend_shared(q, kv, window, None, sinks, positions, lengths, 1, scale)


def _shapes(inputs: Sequence[TensorSpec], attributes: Attributes) -> tuple[TensorSpec, ...]:
    return inputs[0], inputs[2]


@script(v4c, default_opset=op)
def SlidingWindowAttention(
    q: FLOAT[...],
    kv: FLOAT[...],
    window: FLOAT[...],
    sinks: FLOAT[...],
    positions: INT64[...],
    lengths: INT64[...],
    scale: float,
) -> tuple[FLOAT[...], FLOAT[...]]:
    slots, history_positions, source, target = RingIndices(window, kv, positions, lengths)
    history = op.Concat(op.GatherND(window, slots, batch_dims=1), kv, axis=1)
    visible = WindowVisible(window, history_positions)
    out = AttendShared(q, history, visible, sinks, scale=scale)
    return out, op.ScatterND(window, target, op.GatherND(history, source))


SLIDING_ATTENTION = define(
    "SlidingWindowAttention",
    sliding_attention,
    inputs=("q", "kv", "window", "sinks", "positions", "lengths"),
    outputs=("out", "window"),
    attributes={"scale": float},
    shape_rule=_shapes,
    functions=(SlidingWindowAttention, RingIndices, WindowVisible, AttendShared, Attend),
    writes={"window": "window"},
)
