"""Engram output: the looked-up value, gated per residual stream, with a dilated causal convolution over its past."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from onnxscript import INT64, script
from onnxscript import opset23 as op
from onnxscript.onnx_types import FLOAT
from onnxscript.values import Opset
from torch import Tensor
from torch.nn import functional

from .base import DOMAIN, OPSET_VERSION, Attributes, TensorSpec, define
from .onnx_common import RingIndices
from .torch_common import ring_history, ring_write

v4c = Opset(DOMAIN, OPSET_VERSION)


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def engram_gate_conv(
    keys: Tensor,
    value: Tensor,
    streams: Tensor,
    key_norm: Tensor,
    stream_norm: Tensor,
    conv_norm: Tensor,
    conv_weight: Tensor,
    conv_state: Tensor,
    positions: Tensor,
    lengths: Tensor,
    dilation: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Add the context-gated memory and its convolution to the residual streams (Engram paper, sections 2.3 and 2.4).

    Per stream: gate = sigmoid(s(rms(key) . rms(stream) / sqrt(D))) with s(x) = sign(x) * sqrt(max(|x|, 1e-6));
    v = gate * value; the stream gains v + SiLU(conv(rms(v))). Tap j of the depthwise convolution reads the row
    (k - 1 - j) * dilation tokens back, and zero before position 0.

    Args:
        keys: ``[B, S, M, D]`` float32.
        value: ``[B, S, D]`` float32.
        streams: ``[B, S, M, D]`` float32.
        key_norm: ``[M, D]`` float32 RMS norm weight of the keys; `stream_norm` and `conv_norm` likewise.
        stream_norm: of the streams.
        conv_norm: of the gated values that enter the convolution.
        conv_weight: ``[M * D, k]`` float32, k at least 2.
        conv_state: ``[B, (k - 1) * dilation, M * D]`` float32 ring of normalised gated values, slot = position mod
            its size.
        positions: ``[B]`` int64, position of each row's first token.
        lengths: ``[B]`` int64, live tokens of each row.
        dilation: tokens between taps: the longest n-gram.
        eps: of all three norms.

    Returns:
        streams ``[B, S, M, D]`` and the new convolution state.
    """
    chunk, width = value.shape[1], value.shape[-1]
    dot = (_rms(keys, key_norm, eps) * _rms(streams, stream_norm, eps)).sum(-1, keepdim=True) / width**0.5
    gate = torch.sigmoid(dot.sign() * dot.abs().clamp_min(1e-6).sqrt())
    gated = gate * value.unsqueeze(2)
    new = _rms(gated, conv_norm, eps).flatten(2)
    rows, row_positions = ring_history(conv_state, new, positions)
    rows = torch.where(row_positions.unsqueeze(-1) < 0, 0.0, rows)
    conv = torch.zeros_like(new)
    for tap in range(conv_weight.shape[1]):
        conv = conv + rows[:, tap * dilation : tap * dilation + chunk] * conv_weight[:, tap]
    out = streams + gated + functional.silu(conv).view(streams.shape)
    return out, ring_write(conv_state, new, positions, lengths)


def _shapes(inputs: Sequence[TensorSpec], attributes: Attributes) -> tuple[TensorSpec, ...]:
    return inputs[2], inputs[7]


@script(v4c, default_opset=op)
def EngramGateConv(
    keys: FLOAT[...],
    value: FLOAT[...],
    streams: FLOAT[...],
    key_norm: FLOAT[...],
    stream_norm: FLOAT[...],
    conv_norm: FLOAT[...],
    conv_weight: FLOAT[...],
    conv_state: FLOAT[...],
    positions: INT64[...],
    lengths: INT64[...],
    dilation: int,
    eps: float,
) -> tuple[FLOAT[...], FLOAT[...]]:
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    two = op.Constant(value_ints=[2])
    last = op.Constant(value_ints=[-1])
    unit = op.Constant(value_floats=[1.0])
    # The norm weights differ per stream, which RMSNormalization's scale cannot: they are multiplied in after it.
    key = op.RMSNormalization(keys, unit, axis=-1, epsilon=eps)
    stream = op.RMSNormalization(streams, unit, axis=-1, epsilon=eps)
    product = op.Mul(op.Mul(key, stream), op.Mul(key_norm, stream_norm))
    width = op.CastLike(op.Shape(value, start=2), value)
    dot = op.Div(op.ReduceSum(product, last), op.Sqrt(width))
    root = op.Sqrt(op.Max(op.Abs(dot), op.Constant(value_float=1e-6)))
    gated = op.Mul(op.Sigmoid(op.Mul(op.Sign(dot), root)), op.Unsqueeze(value, two))
    normed = op.Mul(op.RMSNormalization(gated, unit, axis=-1, epsilon=eps), conv_norm)
    new = op.Reshape(normed, op.Constant(value_ints=[0, 0, -1]))

    slots, row_positions, source, target = RingIndices(conv_state, new, positions, lengths)
    history = op.Concat(op.GatherND(conv_state, slots, batch_dims=1), new, axis=1)
    state_out = op.ScatterND(conv_state, target, op.GatherND(history, source))

    nothing = op.Constant(value_float=0.0)
    rows = op.Where(op.Unsqueeze(op.Less(row_positions, zero), two), nothing, history)
    chunk = op.Shape(new, start=1, end=2)
    step = op.Reshape(op.Constant(value_int=dilation), one)
    taps = op.Squeeze(op.Shape(conv_weight, start=1))
    conv = op.Expand(nothing, op.Shape(new))
    for tap in range(taps):
        start = op.Mul(tap, step)
        read = op.Slice(rows, start, op.Add(start, chunk), one)
        conv = op.Add(conv, op.Mul(read, op.Gather(conv_weight, tap, axis=1)))
    conv = op.Reshape(op.Mul(conv, op.Sigmoid(conv)), op.Shape(streams))
    return op.Add(op.Add(streams, gated), conv), state_out


ENGRAM_GATE_CONV = define(
    "EngramGateConv",
    engram_gate_conv,
    inputs=(
        "keys",
        "value",
        "streams",
        "key_norm",
        "stream_norm",
        "conv_norm",
        "conv_weight",
        "conv_state",
        "positions",
        "lengths",
    ),
    outputs=("streams", "conv_state"),
    attributes={"dilation": int, "eps": float},
    shape_rule=_shapes,
    functions=(EngramGateConv, RingIndices),
    writes={"conv_state": "conv_state"},
)
