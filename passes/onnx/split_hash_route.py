"""``split-hash-route``: a hash route becomes the lookup of the experts and a `HashRouter` for their weights."""

from __future__ import annotations

import onnx_ir as ir

from v4c.custom_ops import DOMAIN
from v4c.custom_ops.hash_route import HASH_ROUTE
from v4c.custom_ops.hash_router import HASH_ROUTER

from .fuse_topk_router import product_of
from .matching import Fusion, WalkPass, new_node, operand


class SplitHashRoute(WalkPass):
    """Before -> after, if nothing else reads the logits::

        weights, indices = HashRoute(MatMul(x, Transpose(weight)), input_ids, table)

        indices = Gather(table, input_ids)
        weights = HashRouter(x, weight, indices)

    The choice depends on the token ids alone, so the lookup can stand at the head of the graph, where
    `hoist-token-work` takes it; and of the product only the chosen experts' logits are left to compute. It stands
    before `merge-projections`, which would join the router's product to others of the same input.
    """

    pass_name = "split-hash-route"
    anchors = frozenset((HASH_ROUTE.name,))

    def find(self, node: ir.Node) -> Fusion | None:
        """The product whose logits the route `node` reads."""
        logits = product_of(operand(node, 0))
        if node.domain != DOMAIN or logits is None:
            return None
        ids, table = operand(node, 1), operand(node, 2)
        lookup = new_node("Gather", [table, ids], {"axis": 0})
        indices = lookup.outputs[0]
        indices.type = ir.TensorType(ir.DataType.INT64)
        if ids.shape is not None and table.shape is not None:
            indices.shape = ir.Shape([*ids.shape, table.shape[1]])
        router = new_node(
            HASH_ROUTER.name, [logits.x, logits.weight, indices], dict(node.attributes), domain=DOMAIN
        )  # fmt: skip
        replaced = dict(zip(node.outputs, (router.outputs[0], indices), strict=True))
        return Fusion([lookup, router], replaced, shared=[logits.transposed])
