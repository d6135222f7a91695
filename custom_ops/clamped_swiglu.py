"""SwiGLU with the family's clamps, between an expert's projections.

The exporter leaves it as elementwise operators; the pass `fuse-swiglu` puts this op in their place, so that a target
computes it in one sweep with its own vector arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence

from onnxscript import opset23 as op
from onnxscript import script
from onnxscript.onnx_types import FLOAT
from onnxscript.values import Opset
from torch import Tensor

from .base import DOMAIN, OPSET_VERSION, Attributes, TensorSpec, define

v4c = Opset(DOMAIN, OPSET_VERSION)


def clamped_swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """``silu(min(gate, limit)) * clip(up, -limit, limit)`` (V4 paper, section 2.1).

    Args:
        gate: ``[B, S, F]`` float32.
        up: ``[B, S, F]`` float32.
        limit: the model's ``swiglu_limit``.

    Returns:
        ``[B, S, F]`` float32.
    """
    gate = gate.clamp(max=limit)
    return gate * gate.sigmoid() * up.clamp(-limit, limit)


def _shapes(inputs: Sequence[TensorSpec], attributes: Attributes) -> tuple[TensorSpec, ...]:
    return (inputs[0],)


@script(v4c, default_opset=op)
def ClampedSwiGLU(gate: FLOAT[...], up: FLOAT[...], limit: float) -> FLOAT[...]:
    high = op.Constant(value_float=limit)
    low_gate = op.Min(gate, high)
    return op.Mul(op.Mul(low_gate, op.Sigmoid(low_gate)), op.Clip(up, op.Neg(high), high))


CLAMPED_SWIGLU = define(
    "ClampedSwiGLU",
    clamped_swiglu,
    inputs=("gate", "up"),
    outputs=("y",),
    attributes={"limit": float},
    shape_rule=_shapes,
    functions=(ClampedSwiGLU,),
)
