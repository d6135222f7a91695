"""``fuse-topk-router``: the learned router's product and the choice of experts behind it become one `TopKRouter`."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from v4c.custom_ops import DOMAIN
from v4c.custom_ops.topk_route import TOPK_ROUTE
from v4c.custom_ops.topk_router import TOPK_ROUTER

from .matching import Fusion, WalkPass, attribute, new_node, node_of, operand


class FuseTopKRouter(WalkPass):
    """``TopKRoute(MatMul(x, Transpose(weight)), bias)`` -> ``TopKRouter(x, weight, bias)``.

    Nothing else may read the logits. It stands before `merge-projections`, which would join the router's product to
    others of the same input. A decode step then starts threads once for both, and ranks its few logits while they are
    in the cache.
    """

    pass_name = "fuse-topk-router"
    anchors = frozenset((TOPK_ROUTE.name,))

    def find(self, node: ir.Node) -> Fusion | None:
        """The product whose logits the route `node` reads."""
        logits = product_of(operand(node, 0))
        if node.domain != DOMAIN or logits is None:
            return None
        fused = new_node(
            TOPK_ROUTER.name, [logits.x, logits.weight, operand(node, 1)], dict(node.attributes),
            domain=DOMAIN, outputs=2,
        )  # fmt: skip
        return Fusion([fused], dict(zip(node.outputs, fused.outputs, strict=True)), shared=[logits.transposed])


@dataclass(frozen=True)
class Product:
    """``MatMul(x, Transpose(weight))`` with `weight` ``[N, K]``; the transposed weight may be read by others too."""

    x: ir.Value
    weight: ir.Value
    transposed: ir.Value


def product_of(value: ir.Value) -> Product | None:
    """The product that gives `value`, None if none does."""
    product = node_of(value, "MatMul")
    transpose = node_of(product.inputs[1], "Transpose") if product is not None else None
    if product is None or transpose is None or list(attribute(transpose, "perm", ())) != [1, 0]:
        return None
    return Product(operand(product, 0), operand(transpose, 0), operand(product, 1))
