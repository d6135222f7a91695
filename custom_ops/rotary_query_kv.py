"""The normalised and rotated query heads and key/value rows of an attention layer, from their projections.

Both take the angles of the same tokens, so a target computes them once; the pass `fuse-rotary-query-kv` puts this op in
the place of two norms and two rotations.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from onnxscript import INT64, script
from onnxscript import opset23 as op
from onnxscript.onnx_types import FLOAT
from torch import Tensor

from .base import Attributes, TensorSpec, define
from .onnx_common import v4c
from .trailing_rope import TRAILING_ROPE, TrailingRope, trailing_rope


def rotary_query_kv(
    q: Tensor, kv: Tensor, kv_norm: Tensor, positions: Tensor, inv_freq: Tensor, q_eps: float, kv_eps: float
) -> tuple[Tensor, Tensor]:
    """RMS norm of every query head and of the key/value row, then interleaved RoPE on both (V4 paper, section 2.3).

    Args:
        q: ``[B, S, H, C]`` float32; a head is normalised without a weight.
        kv: ``[B, S, C]`` float32.
        kv_norm: ``[C]`` float32, RMSNorm weight of `kv`.
        positions: ``[B]`` int64, position of each row's first token.
        inv_freq: ``[R / 2]`` float32; R trailing dims are rotated.
        q_eps, kv_eps: added to the mean square of a head and of a row.

    Returns:
        ``[B, S, H, C]`` and ``[B, S, C]`` float32.
    """
    width = (q.shape[-1],)
    heads = F.rms_norm(q, width, eps=q_eps)
    row = F.rms_norm(kv, width, kv_norm, kv_eps)[:, :, None]
    return (
        trailing_rope(heads, positions, inv_freq, 1.0),
        trailing_rope(row, positions, inv_freq, 1.0)[:, :, 0],
    )


def _shapes(inputs: Sequence[TensorSpec], attributes: Attributes) -> tuple[TensorSpec, ...]:
    return inputs[0], inputs[1]


@script(v4c, default_opset=op)
def RotaryQueryKV(
    q: FLOAT[...],
    kv: FLOAT[...],
    kv_norm: FLOAT[...],
    positions: INT64[...],
    inv_freq: FLOAT[...],
    q_eps: float,
    kv_eps: float,
) -> tuple[FLOAT[...], FLOAT[...]]:
    axis = op.Constant(value_ints=[2])
    ones = op.Expand(op.Constant(value_floats=[1.0]), op.Shape(kv_norm))
    heads = op.RMSNormalization(q, ones, axis=-1, epsilon=q_eps)
    row = op.Unsqueeze(op.RMSNormalization(kv, kv_norm, axis=-1, epsilon=kv_eps), axis)
    q_rotated = TrailingRope(heads, positions, inv_freq, sign=1.0)
    return q_rotated, op.Squeeze(TrailingRope(row, positions, inv_freq, sign=1.0), axis)


ROTARY_QUERY_KV = define(
    "RotaryQueryKV",
    rotary_query_kv,
    inputs=("q", "kv", "kv_norm", "positions", "inv_freq"),
    outputs=("q_rotated", "kv_rotated"),
    attributes={"q_eps": float, "kv_eps": float},
    shape_rule=_shapes,
    functions=(RotaryQueryKV, *TRAILING_ROPE.functions),
)
