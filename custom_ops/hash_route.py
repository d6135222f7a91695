"""Fixed expert routing of the first layers: a table gives each token id its experts; only their weights are learned."""

from __future__ import annotations

from collections.abc import Sequence

from onnxscript import INT64, script
from onnxscript import opset23 as op
from onnxscript.onnx_types import FLOAT
from onnxscript.values import Opset
from torch import Tensor
from torch.nn import functional

from .base import DOMAIN, OPSET_VERSION, Attributes, TensorSpec, define
from .topk_route import RouteScores, RouteWeights, route_weights

v4c = Opset(DOMAIN, OPSET_VERSION)


def hash_route(logits: Tensor, input_ids: Tensor, table: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Experts by token id, weighted by sqrt(softplus(logit)) (DeepSeek-V4 paper, section 2.1).

    Args:
        logits: ``[B, S, E]`` float32.
        input_ids: ``[B, S]`` int64.
        table: ``[V, K]`` int64, the experts of each token id.
        scaling: the sum of a token's weights.

    Returns:
        weights ``[B, S, K]`` float32 and indices ``[B, S, K]`` int64, in the table's order.
    """
    indices = table[input_ids]
    return route_weights(functional.softplus(logits).sqrt(), indices, scaling), indices


def _shapes(inputs: Sequence[TensorSpec], attributes: Attributes) -> tuple[TensorSpec, ...]:
    shape = (*inputs[1].shape, inputs[2].shape[1])
    return TensorSpec(shape), TensorSpec(shape, "int64")


@script(v4c, default_opset=op)
def HashRoute(
    logits: FLOAT[...], input_ids: INT64[...], table: INT64[...], scaling: float
) -> tuple[FLOAT[...], INT64[...]]:
    indices = op.Gather(table, input_ids)
    return RouteWeights(RouteScores(logits), indices, scaling=scaling), indices


HASH_ROUTE = define(
    "HashRoute",
    hash_route,
    inputs=("logits", "input_ids", "table"),
    outputs=("weights", "indices"),
    attributes={"scaling": float},
    shape_rule=_shapes,
    functions=(HashRoute, RouteScores, RouteWeights),
)
