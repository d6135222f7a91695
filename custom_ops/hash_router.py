"""The weights of experts that are fixed by token id: what is left of `HashRoute` once the choice stands apart.

The pass `split-hash-route` makes it. The experts being known, only their rows of the router matrix have to be read.
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
from .topk_route import RouteScores, RouteWeights, route_weights

v4c = Opset(DOMAIN, OPSET_VERSION)


def hash_router(x: Tensor, weight: Tensor, indices: Tensor, scaling: float) -> Tensor:
    """The weights that `HashRoute` gives the experts `indices` (DeepSeek-V4 paper, section 2.1).

    The reference and the ONNX body compute every expert's logit, which no output depends on but for the chosen ones.

    Args:
        x: ``[B, S, D]`` float32.
        weight: ``[E, D]`` float32, the router matrix.
        indices: ``[B, S, K]`` int64 in [0, E), the experts of each token.
        scaling: the sum of a token's weights.

    Returns:
        ``[B, S, K]`` float32, in the order of `indices`.
    """
    return route_weights(functional.softplus(functional.linear(x, weight)).sqrt(), indices, scaling)


def _shapes(inputs: Sequence[TensorSpec], attributes: Attributes) -> tuple[TensorSpec, ...]:
    return (TensorSpec(inputs[2].shape),)


@script(v4c, default_opset=op)
def HashRouter(x: FLOAT[...], weight: FLOAT[...], indices: INT64[...], scaling: float) -> FLOAT[...]:
    logits = op.MatMul(x, op.Transpose(weight, perm=[1, 0]))
    return RouteWeights(RouteScores(logits), indices, scaling=scaling)


HASH_ROUTER = define(
    "HashRouter",
    hash_router,
    inputs=("x", "weight", "indices"),
    outputs=("weights",),
    attributes={"scaling": float},
    shape_rule=_shapes,
    functions=(HashRouter, RouteScores, RouteWeights),
)
