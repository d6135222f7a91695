"""Manifold-constrained hyper-connections (mHC), entry of a sublayer: the residual streams are collapsed into one.

Also yields the weights that `mhc_post` uses to spread the sublayer's output over the streams and to mix them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from onnxscript import opset23 as op
from onnxscript import script
from onnxscript.onnx_types import FLOAT
from onnxscript.values import Opset
from torch import Tensor
from torch.nn import functional

from .base import DOMAIN, OPSET_VERSION, Attributes, TensorSpec, define

v4c = Opset(DOMAIN, OPSET_VERSION)


def project_streams(streams: Tensor, fn: Tensor, norm_eps: float) -> Tensor:
    """Unweighted RMS norm over all streams of a token together, then a linear map.

    Args:
        streams: ``[B, S, M, D]``.
        fn: ``[Z, M * D]``.
        norm_eps: added to the mean square.

    Returns:
        ``[B, S, Z]``.
    """
    flat = streams.flatten(2)
    return functional.linear(flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps), fn)


def mhc_pre(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iterations: int, hc_eps: float, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Collapse the residual streams and compute the mixing weights of one sublayer (mHC paper, section 4.2).

    Args:
        streams: ``[B, S, M, D]`` float32.
        fn: ``[(2 + M) * M, M * D]`` float32; its rows give the logits of pre (M), post (M) and comb (M * M).
        base: ``[(2 + M) * M]`` float32, added to the scaled logits.
        scale: ``[3]`` float32, of the pre, post and comb logits.
        iterations: Sinkhorn-Knopp iterations; the first normalises columns only, as a softmax has done the rows.
        hc_eps: added to the pre weights, to the softmax and to every Sinkhorn divisor.
        norm_eps: of the RMS norm.

    Returns:
        collapsed ``[B, S, D]``, post ``[B, S, M]`` and comb ``[B, S, M, M]``, float32. Rows and columns of comb sum to
        one, up to what the iterations leave.
    """
    rows, m = streams.shape[:2], streams.shape[2]
    logits = project_streams(streams, fn, norm_eps)
    pre_logits, post_logits, comb_logits = logits.split([m, m, m * m], dim=-1)
    pre_base, post_base, comb_base = base.split([m, m, m * m])
    pre = torch.sigmoid(pre_logits * scale[0] + pre_base) + hc_eps
    post = 2 * torch.sigmoid(post_logits * scale[1] + post_base)
    comb = torch.softmax((comb_logits * scale[2] + comb_base).view(*rows, m, m), dim=-1) + hc_eps
    comb = comb / (comb.sum(-2, keepdim=True) + hc_eps)
    for _ in range(iterations - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + hc_eps)
        comb = comb / (comb.sum(-2, keepdim=True) + hc_eps)
    return (pre.unsqueeze(-1) * streams).sum(2), post, comb


def _shapes(inputs: Sequence[TensorSpec], attributes: Attributes) -> tuple[TensorSpec, ...]:
    batch, chunk, m, width = inputs[0].shape
    return TensorSpec((batch, chunk, width)), TensorSpec((batch, chunk, m)), TensorSpec((batch, chunk, m, m))


@script(v4c, default_opset=op)
def ProjectStreams(streams: FLOAT[...], fn: FLOAT[...], norm_eps: float) -> FLOAT[...]:
    # [B * S, Z]: two dimensions, so that Gemm can take the weight as it is stored.
    unit = op.Constant(value_floats=[1.0])
    flat = op.RMSNormalization(op.Flatten(streams, axis=2), unit, axis=-1, epsilon=norm_eps)
    return op.Gemm(flat, fn, transB=1)


@script(v4c, default_opset=op)
def MHCPre(
    streams: FLOAT[...],
    fn: FLOAT[...],
    base: FLOAT[...],
    scale: FLOAT[...],
    iterations: int,
    hc_eps: float,
    norm_eps: float,
) -> tuple[FLOAT[...], FLOAT[...], FLOAT[...]]:
    eps = op.Constant(value_float=hc_eps)
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    two = op.Constant(value_ints=[2])
    last = op.Constant(value_ints=[-1])
    second_last = op.Constant(value_ints=[-2])
    m = op.Shape(streams, start=2, end=3)
    # The logits seen as [2 + M, M]: row 0 is pre, row 1 is post, the others are comb, which share the last scale.
    projected = ProjectStreams(streams, fn, norm_eps=norm_eps)
    logits = op.Reshape(projected, op.Concat(op.Shape(streams, end=2), last, m, axis=0))
    scales = op.Unsqueeze(op.Pad(scale, op.Concat(zero, op.Sub(m, one), axis=0), mode="edge"), last)
    logits = op.Add(op.Mul(logits, scales), op.Reshape(base, op.Concat(last, m, axis=0)))
    pre, post, comb = op.Split(logits, op.Concat(one, one, m, axis=0), axis=2)
    collapsed = op.Squeeze(op.MatMul(op.Add(op.Sigmoid(pre), eps), streams), two)
    post = op.Squeeze(op.Mul(op.Sigmoid(post), op.Constant(value_float=2.0)), two)
    comb = op.Add(op.Softmax(comb, axis=-1), eps)
    comb = op.Div(comb, op.Add(op.ReduceSum(comb, second_last), eps))
    remaining = op.Sub(op.Constant(value_int=iterations), op.Constant(value_int=1))
    for _ in range(remaining):
        comb = op.Div(comb, op.Add(op.ReduceSum(comb, last), eps))
        comb = op.Div(comb, op.Add(op.ReduceSum(comb, second_last), eps))
    return collapsed, post, comb


MHC_PRE = define(
    "MHCPre",
    mhc_pre,
    inputs=("streams", "fn", "base", "scale"),
    outputs=("collapsed", "post", "comb"),
    attributes={"iterations": int, "hc_eps": float, "norm_eps": float},
    shape_rule=_shapes,
    functions=(MHCPre, ProjectStreams),
)
