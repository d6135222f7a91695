"""The learned router in one op, its product and the choice of experts; the pass `fuse-topk-router` makes it."""

from __future__ import annotations

from collections.abc import Sequence

from onnxscript import INT64, script
from onnxscript import opset23 as op
from onnxscript.onnx_types import FLOAT
from onnxscript.values import Opset
from torch import Tensor
from torch.nn import functional

from .base import DOMAIN, OPSET_VERSION, Attributes, TensorSpec, define
from .topk_route import RouteScores, RouteWeights, TopKRoute, topk_route

v4c = Opset(DOMAIN, OPSET_VERSION)


def topk_router(x: Tensor, weight: Tensor, bias: Tensor, top_k: int, scaling: float) -> tuple[Tensor, Tensor]:
    """`TopKRoute` of the logits ``x @ weight.T`` (DeepSeek-V4 paper, section 2.1).

    Args:
        x: ``[B, S, D]`` float32.
        weight: ``[E, D]`` float32, the router matrix.
        bias: ``[E]`` float32, the load-balancing correction; it moves the choice, not the weights.
        top_k: experts per token, at most E.
        scaling: the sum of a token's weights.

    Returns:
        weights ``[B, S, top_k]`` float32 and indices ``[B, S, top_k]`` int64, by descending biased score; of equal ones
        the smaller index comes first.
    """
    return topk_route(functional.linear(x, weight), bias, top_k, scaling)


def _shapes(inputs: Sequence[TensorSpec], attributes: Attributes) -> tuple[TensorSpec, ...]:
    shape = (*inputs[0].shape[:2], attributes["top_k"])
    return TensorSpec(shape), TensorSpec(shape, "int64")


@script(v4c, default_opset=op)
def TopKRouter(
    x: FLOAT[...], weight: FLOAT[...], bias: FLOAT[...], top_k: int, scaling: float
) -> tuple[FLOAT[...], INT64[...]]:
    logits = op.MatMul(x, op.Transpose(weight, perm=[1, 0]))
    weights, indices = TopKRoute(logits, bias, top_k=top_k, scaling=scaling)
    return weights, indices


TOPK_ROUTER = define(
    "TopKRouter",
    topk_router,
    inputs=("x", "weight", "bias"),
    outputs=("weights", "indices"),
    attributes={"top_k": int, "scaling": float},
    shape_rule=_shapes,
    functions=(TopKRouter, TopKRoute, RouteScores, RouteWeights),
)
