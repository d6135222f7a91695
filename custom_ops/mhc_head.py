"""Manifold-constrained hyper-connections (mHC), end of the model: the streams become the row of the final norm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from onnxscript import opset23 as op
from onnxscript import script
from onnxscript.onnx_types import FLOAT
from onnxscript.values import Opset
from torch import Tensor

from .base import DOMAIN, OPSET_VERSION, Attributes, TensorSpec, define
from .mhc_pre import ProjectStreams, project_streams

v4c = Opset(DOMAIN, OPSET_VERSION)


def mhc_head(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, hc_eps: float, norm_eps: float) -> Tensor:
    """Collapse the streams after the last layer, with weights computed from them as in `mhc_pre`.

    Args:
        streams: ``[B, S, M, D]`` float32.
        fn: ``[M, M * D]`` float32.
        base: ``[M]`` float32.
        scale: ``[1]`` float32.
        hc_eps: added to the weights.
        norm_eps: of the RMS norm.

    Returns:
        ``[B, S, D]`` float32.
    """
    weights = torch.sigmoid(project_streams(streams, fn, norm_eps) * scale + base) + hc_eps
    return (weights.unsqueeze(-1) * streams).sum(2)


def _shapes(inputs: Sequence[TensorSpec], attributes: Attributes) -> tuple[TensorSpec, ...]:
    batch, chunk, _, width = inputs[0].shape
    return (TensorSpec((batch, chunk, width)),)


@script(v4c, default_opset=op)
def MHCHead(
    streams: FLOAT[...], fn: FLOAT[...], base: FLOAT[...], scale: FLOAT[...], hc_eps: float, norm_eps: float
) -> FLOAT[...]:
    logits = op.Add(op.Mul(ProjectStreams(streams, fn, norm_eps=norm_eps), scale), base)
    weights = op.Add(op.Sigmoid(logits), op.Constant(value_float=hc_eps))
    # One row of weights per token: [B, S, 1, M] times [B, S, M, D].
    row = op.Concat(op.Shape(streams, end=2), op.Constant(value_ints=[1, -1]), axis=0)
    return op.Squeeze(op.MatMul(op.Reshape(weights, row), streams), op.Constant(value_ints=[2]))


MHC_HEAD = define(
    "MHCHead",
    mhc_head,
    inputs=("streams", "fn", "base", "scale"),
    outputs=("collapsed",),
    attributes={"hc_eps": float, "norm_eps": float},
    shape_rule=_shapes,
    functions=(MHCHead, ProjectStreams),
)
