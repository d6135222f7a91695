"""Learned expert routing: the experts with the highest biased scores, weighted by their unbiased ones."""

from __future__ import annotations

from collections.abc import Sequence

from onnxscript import INT64, script
from onnxscript import opset23 as op
from onnxscript.onnx_types import FLOAT
from onnxscript.values import Opset
from torch import Tensor
from torch.nn import functional

from .base import DOMAIN, OPSET_VERSION, Attributes, TensorSpec, define

v4c = Opset(DOMAIN, OPSET_VERSION)


def route_weights(scores: Tensor, indices: Tensor, scaling: float) -> Tensor:
    """The chosen experts' scores, normalised to sum to `scaling`.

    Args:
        scores: ``[B, S, E]``.
        indices: ``[B, S, K]`` int64.
        scaling: the model's ``routed_scaling_factor``.

    Returns:
        ``[B, S, K]``; all zero where every chosen score is.
    """
    chosen = scores.gather(-1, indices)
    return chosen / (chosen.sum(-1, keepdim=True) + 1e-20) * scaling


def topk_route(logits: Tensor, bias: Tensor, top_k: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Choose `top_k` experts per token by sqrt(softplus(logit)) + bias (DeepSeek-V4 paper, section 2.1).

    Args:
        logits: ``[B, S, E]`` float32.
        bias: ``[E]`` float32, the load-balancing correction; it moves the choice, not the weights.
        top_k: experts per token, at most E.
        scaling: the sum of a token's weights.

    Returns:
        weights ``[B, S, top_k]`` float32 and indices ``[B, S, top_k]`` int64, by descending biased score; of equal ones
        the smaller index comes first.
    """
    scores = functional.softplus(logits).sqrt()
    # A stable sort keeps equal scores in index order; torch.topk leaves their order open.
    indices = (scores + bias).sort(dim=-1, descending=True, stable=True).indices[..., :top_k].contiguous()
    return route_weights(scores, indices, scaling), indices


def _shapes(inputs: Sequence[TensorSpec], attributes: Attributes) -> tuple[TensorSpec, ...]:
    shape = (*inputs[0].shape[:2], attributes["top_k"])
    return TensorSpec(shape), TensorSpec(shape, "int64")


@script(v4c, default_opset=op)
def RouteScores(logits: FLOAT[...]) -> FLOAT[...]:
    return op.Sqrt(op.Softplus(logits))


@script(v4c, default_opset=op)
def RouteWeights(scores: FLOAT[...], indices: INT64[...], scaling: float) -> FLOAT[...]:
    chosen = op.GatherElements(scores, indices, axis=-1)
    total = op.Add(op.ReduceSum(chosen, op.Constant(value_ints=[-1])), op.Constant(value_float=1e-20))
    return op.Mul(op.Div(chosen, total), op.Constant(value_float=scaling))


@script(v4c, default_opset=op)
def TopKRoute(logits: FLOAT[...], bias: FLOAT[...], top_k: int, scaling: float) -> tuple[FLOAT[...], INT64[...]]:
    scores = RouteScores(logits)
    count = op.Reshape(op.Constant(value_int=top_k), op.Constant(value_ints=[1]))
    _, indices = op.TopK(op.Add(scores, bias), count)
    return RouteWeights(scores, indices, scaling=scaling), indices


TOPK_ROUTE = define(
    "TopKRoute",
    topk_route,
    inputs=("logits", "bias"),
    outputs=("weights", "indices"),
    attributes={"top_k": int, "scaling": float},
    shape_rule=_shapes,
    functions=(TopKRoute, RouteScores, RouteWeights),
)
