"""Routed experts and the shared one in one op: the whole of a layer's MLP behind the router.

The pass `fuse-shared-expert` makes it, so that a target can share out the work of both among its threads at once.
"""

from __future__ import annotations

from collections.abc import Sequence

from onnxscript import INT64, script
from onnxscript import opset23 as op
from onnxscript.onnx_types import FLOAT
from onnxscript.values import Opset
from torch import Tensor
from torch.nn import functional

from .base import DOMAIN, OPSET_VERSION, Attributes, TensorSpec, define
from .clamped_swiglu import ClampedSwiGLU, clamped_swiglu
from .grouped_experts import GroupedExperts, grouped_experts

v4c = Opset(DOMAIN, OPSET_VERSION)


def mixture_of_experts(
    x: Tensor,
    weights: Tensor,
    indices: Tensor,
    gate_up: Tensor,
    down: Tensor,
    shared_gate_up: Tensor,
    shared_down: Tensor,
    limit: float,
) -> Tensor:
    """`GroupedExperts` plus a shared expert that every token passes through (DeepSeek-V4 paper, section 2.1).

    y = sum over k of weight_k * expert_k(x) + shared(x), every expert being
    down(silu(min(gate, limit)) * clamp(up, -limit, limit)).

    Args:
        x: ``[B, S, D]`` float32.
        weights: ``[B, S, K]`` float32.
        indices: ``[B, S, K]`` int64 below E; -1 stands for no expert, whatever its weight.
        gate_up: ``[E, 2F, D]`` float32, bfloat16 or float16; the F gate rows come first.
        down: ``[E, D, F]``, of the same dtype.
        shared_gate_up: ``[2G, D]`` float32; the G gate rows come first.
        shared_down: ``[D, G]`` float32.
        limit: the model's ``swiglu_limit``.

    Returns:
        ``[B, S, D]`` float32.
    """
    gate, up = functional.linear(x, shared_gate_up).chunk(2, dim=-1)
    shared = functional.linear(clamped_swiglu(gate, up, limit), shared_down)
    return grouped_experts(x, weights, indices, gate_up, down, limit) + shared


def _shapes(inputs: Sequence[TensorSpec], attributes: Attributes) -> tuple[TensorSpec, ...]:
    return (inputs[0],)


@script(v4c, default_opset=op)
def MixtureOfExperts(
    x: FLOAT[...],
    weights: FLOAT[...],
    indices: INT64[...],
    gate_up: FLOAT[...],
    down: FLOAT[...],
    shared_gate_up: FLOAT[...],
    shared_down: FLOAT[...],
    limit: float,
) -> FLOAT[...]:
    both = op.MatMul(x, op.Transpose(shared_gate_up, perm=[1, 0]))
    gate, up = op.Split(both, num_outputs=2, axis=-1)
    hidden = ClampedSwiGLU(gate, up, limit=limit)
    shared = op.MatMul(hidden, op.Transpose(shared_down, perm=[1, 0]))
    return op.Add(GroupedExperts(x, weights, indices, gate_up, down, limit=limit), shared)


MIXTURE_OF_EXPERTS = define(
    "MixtureOfExperts",
    mixture_of_experts,
    inputs=("x", "weights", "indices", "gate_up", "down", "shared_gate_up", "shared_down"),
    outputs=("y",),
    attributes={"limit": float},
    shape_rule=_shapes,
    functions=(MixtureOfExperts, GroupedExperts, ClampedSwiGLU),
)
