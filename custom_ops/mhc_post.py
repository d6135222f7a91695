"""Manifold-constrained hyper-connections (mHC), exit of a sublayer: its output joins the mixed residual streams."""

from __future__ import annotations

from collections.abc import Sequence

from onnxscript import opset23 as op
from onnxscript import script
from onnxscript.onnx_types import FLOAT
from onnxscript.values import Opset
from torch import Tensor

from .base import DOMAIN, OPSET_VERSION, Attributes, TensorSpec, define

v4c = Opset(DOMAIN, OPSET_VERSION)


def mhc_post(x: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """New streams: stream_k = post_k * x + sum_j comb[j, k] * stream_j (mHC paper, section 4.2).

    Args:
        x: ``[B, S, D]`` float32, the sublayer's output.
        streams: ``[B, S, M, D]`` float32, as they entered the sublayer.
        post: ``[B, S, M]`` float32.
        comb: ``[B, S, M, M]`` float32; applied transposed: its first index is the old stream.

    Returns:
        ``[B, S, M, D]`` float32.
    """
    return post.unsqueeze(-1) * x.unsqueeze(-2) + comb.transpose(-1, -2) @ streams


def _shapes(inputs: Sequence[TensorSpec], attributes: Attributes) -> tuple[TensorSpec, ...]:
    return (inputs[1],)


@script(v4c, default_opset=op)
def MHCPost(x: FLOAT[...], streams: FLOAT[...], post: FLOAT[...], comb: FLOAT[...]) -> FLOAT[...]:
    mixed = op.MatMul(op.Transpose(comb, perm=[0, 1, 3, 2]), streams)
    spread = op.Mul(op.Unsqueeze(post, op.Constant(value_ints=[3])), op.Unsqueeze(x, op.Constant(value_ints=[2])))
    return op.Add(spread, mixed)


MHC_POST = define(
    "MHCPost",
    mhc_post,
    inputs=("x", "streams", "post", "comb"),
    outputs=("streams",),
    shape_rule=_shapes,
    functions=(MHCPost,),
)
