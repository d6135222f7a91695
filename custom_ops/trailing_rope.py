"""Rotary position embedding on the trailing dims, interleaved pairs: queries, keys, and (sign -1) attention outputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from onnxscript import INT64, script
from onnxscript import opset23 as op
from onnxscript.onnx_types import FLOAT
from torch import Tensor

from .base import Attributes, TensorSpec, define
from .onnx_common import TokenPositions, v4c
from .torch_common import token_positions


def rotate(x: Tensor, angle_positions: Tensor, inv_freq: Tensor, sign: float) -> Tensor:
    """Rotate the last ``2 * len(inv_freq)`` dims of `x` in interleaved pairs (2i, 2i+1).

    Args:
        x: ``[..., D]``.
        angle_positions: int64, broadcastable to ``x.shape[:-1]``.
        inv_freq: ``[R / 2]`` angle per position of each pair.
        sign: 1.0 rotates forward, -1.0 back.
    """
    width = 2 * inv_freq.shape[0]
    angles = angle_positions.to(inv_freq.dtype).unsqueeze(-1) * inv_freq
    cos, sin = angles.cos(), angles.sin() * sign
    kept, even, odd = x[..., :-width], x[..., -width::2], x[..., -width + 1 :: 2]
    pairs = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return torch.cat([kept, pairs.flatten(-2)], dim=-1)


def trailing_rope(x: Tensor, positions: Tensor, inv_freq: Tensor, sign: float) -> Tensor:
    """Interleaved RoPE on the trailing dims of every head (DeepSeek-V4 paper, section 2.3).

    Args:
        x: ``[B, S, H, D]`` float32.
        positions: ``[B]`` int64, position of each row's first token.
        inv_freq: ``[R / 2]`` float32; R trailing dims are rotated.
        sign: 1.0 for queries and keys, -1.0 to rotate attention outputs back.

    Returns:
        ``[B, S, H, D]`` float32.
    """
    return rotate(x, token_positions(positions, x.shape[1])[:, :, None], inv_freq, sign)


def _shapes(inputs: Sequence[TensorSpec], attributes: Attributes) -> tuple[TensorSpec, ...]:
    return (inputs[0],)


@script(v4c, default_opset=op)
def RotateTrailing(x: FLOAT[...], angle_positions: INT64[...], inv_freq: FLOAT[...], sign: float) -> FLOAT[...]:
    last = op.Constant(value_ints=[-1])
    one = op.Constant(value_ints=[1])
    two = op.Constant(value_ints=[2])
    angles = op.Mul(op.Unsqueeze(op.CastLike(angle_positions, inv_freq), last), inv_freq)
    cos = op.Cos(angles)
    sin = op.Mul(op.Sin(angles), op.Constant(value_float=sign))
    width = op.Shape(x, start=-1)
    rotated = op.Mul(op.Shape(inv_freq), two)
    first = op.Sub(width, rotated)
    kept = op.Slice(x, op.Constant(value_ints=[0]), first, last)
    even = op.Slice(x, first, width, last, two)
    odd = op.Slice(x, op.Add(first, one), width, last, two)
    real = op.Unsqueeze(op.Sub(op.Mul(even, cos), op.Mul(odd, sin)), last)
    imag = op.Unsqueeze(op.Add(op.Mul(odd, cos), op.Mul(even, sin)), last)
    pairs = op.Reshape(op.Concat(real, imag, axis=-1), op.Concat(op.Shape(x, end=-1), rotated, axis=0))
    return op.Concat(kept, pairs, axis=-1)


@script(v4c, default_opset=op)
def TrailingRope(x: FLOAT[...], positions: INT64[...], inv_freq: FLOAT[...], sign: float) -> FLOAT[...]:
    token_positions = TokenPositions(x, positions)
    return RotateTrailing(x, op.Unsqueeze(token_positions, op.Constant(value_ints=[2])), inv_freq, sign=sign)


TRAILING_ROPE = define(
    "TrailingRope",
    trailing_rope,
    inputs=("x", "positions", "inv_freq"),
    outputs=("y",),
    attributes={"sign": float},
    shape_rule=_shapes,
    functions=(TrailingRope, RotateTrailing, TokenPositions),
)
