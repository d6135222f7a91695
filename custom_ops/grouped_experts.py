"""Routed experts: tokens are grouped by expert, and only experts that some token chose are read and computed."""

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

v4c = Opset(DOMAIN, OPSET_VERSION)


def grouped_experts(x: Tensor, weights: Tensor, indices: Tensor, gate_up: Tensor, down: Tensor, limit: float) -> Tensor:
    """Weighted sum of each token's experts, SwiGLU with clamps (DeepSeek-V4 paper, section 2.1).

    y = sum over k of weight_k * down(silu(min(gate, limit)) * clamp(up, -limit, limit)). Time and memory follow the
    experts chosen, not E.

    Args:
        x: ``[B, S, D]`` float32.
        weights: ``[B, S, K]`` float32.
        indices: ``[B, S, K]`` int64 below E; -1 stands for no expert, whatever its weight.
        gate_up: ``[E, 2F, D]`` float32, bfloat16 or float16; the F gate rows come first.
        down: ``[E, D, F]``, of the same dtype.
        limit: the model's ``swiglu_limit``.

    Returns:
        ``[B, S, D]`` float32.
    """
    flat = x.flatten(0, 1)
    choices = indices.flatten()
    order = choices.argsort(stable=True)
    experts, counts = choices[order].unique_consecutive(return_counts=True)
    out = torch.zeros_like(flat)
    for expert, group in zip(experts.tolist(), order.split(counts.tolist()), strict=True):
        if expert < 0:
            continue
        tokens = group // indices.shape[-1]
        gate, up = functional.linear(flat[tokens], gate_up[expert].to(x.dtype)).chunk(2, dim=-1)
        hidden = functional.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)
        result = functional.linear(hidden, down[expert].to(x.dtype))
        out.index_add_(0, tokens, result * weights.flatten()[group, None])
    return out.view(x.shape)


def _shapes(inputs: Sequence[TensorSpec], attributes: Attributes) -> tuple[TensorSpec, ...]:
    return (inputs[0],)


@script(v4c, default_opset=op)
def GroupedExperts(
    x: FLOAT[...], weights: FLOAT[...], indices: INT64[...], gate_up: FLOAT[...], down: FLOAT[...], limit: float
) -> FLOAT[...]:
    one = op.Constant(value_ints=[1])
    high = op.Constant(value_float=limit)
    low = op.Neg(high)
    flat = op.Flatten(x, axis=2)
    choices = op.Flatten(indices, axis=2)
    flat_weights = op.Flatten(weights, axis=2)
    experts, _, _, _ = op.Unique(choices)
    experts = op.Compress(experts, op.GreaterOrEqual(experts, op.Constant(value_int=0)))
    out = op.Expand(op.Constant(value_float=0.0), op.Shape(flat))
    count = op.Squeeze(op.Shape(experts))
    for i in range(count):
        expert = op.Gather(experts, i)
        # [n, 2]: token and choice of every use of this expert.
        uses = op.Transpose(op.NonZero(op.Equal(choices, expert)), perm=[1, 0])
        tokens = op.Slice(uses, op.Constant(value_ints=[0]), one, one)
        # Cast after the gather: no expert but this one is converted.
        both = op.Gemm(op.GatherND(flat, tokens), op.Cast(op.Gather(gate_up, expert), to=1), transB=1)
        gate, up = op.Split(both, num_outputs=2, axis=1)
        gate = op.Min(gate, high)
        hidden = op.Mul(op.Mul(gate, op.Sigmoid(gate)), op.Clip(up, low, high))
        result = op.Gemm(hidden, op.Cast(op.Gather(down, expert), to=1), transB=1)
        scale = op.Unsqueeze(op.GatherND(flat_weights, uses), one)
        out = op.ScatterND(out, tokens, op.Mul(result, scale), reduction="add")
    return op.Reshape(out, op.Shape(x))


GROUPED_EXPERTS = define(
    "GroupedExperts",
    grouped_experts,
    inputs=("x", "weights", "indices", "gate_up", "down"),
    outputs=("y",),
    attributes={"limit": float},
    shape_rule=_shapes,
    functions=(GroupedExperts,),
)
