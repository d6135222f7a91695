"""RMS norm, then a projection of the result that nothing else reads.

The exporter leaves a norm and a product; the pass `fuse-norm-projection` puts this op in their place, so that a target
can normalise the rows within the projection's kernel and keep them from a round trip of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

from onnxscript import opset23 as op
from onnxscript import script
from onnxscript.onnx_types import FLOAT
from onnxscript.values import Opset
from torch import Tensor
from torch.nn import functional

from .base import DOMAIN, OPSET_VERSION, Attributes, TensorSpec, define

v4c = Opset(DOMAIN, OPSET_VERSION)


def rms_norm_linear(x: Tensor, norm: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``y = (x / sqrt(mean(x**2) + eps) * norm) @ weight.T`` (as the queries are made, V4 paper, section 2.3).

    Args:
        x: ``[B, S, K]`` float32.
        norm: ``[K]`` float32, the norm's weight.
        weight: ``[N, K]`` float32, bfloat16 or float16.
        eps: added to the mean square.

    Returns:
        ``[B, S, N]`` float32.
    """
    return functional.linear(functional.rms_norm(x, norm.shape, norm, eps), weight.to(x.dtype))


def _shapes(inputs: Sequence[TensorSpec], attributes: Attributes) -> tuple[TensorSpec, ...]:
    x, _, weight = inputs
    return (TensorSpec((*x.shape[:2], weight.shape[0])),)


@script(v4c, default_opset=op)
def RMSNormLinear(x: FLOAT[...], norm: FLOAT[...], weight: FLOAT[...], eps: float) -> FLOAT[...]:
    normed = op.RMSNormalization(x, norm, axis=-1, epsilon=eps)
    return op.MatMul(normed, op.Transpose(op.Cast(weight, to=1), perm=[1, 0]))


RMS_NORM_LINEAR = define(
    "RMSNormLinear",
    rms_norm_linear,
    inputs=("x", "norm", "weight"),
    outputs=("y",),
    attributes={"eps": float},
    shape_rule=_shapes,
    functions=(RMSNormLinear,),
)
