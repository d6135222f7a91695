"""``fuse-norm-projection``: an RMS norm that only a product reads becomes that product's first step."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from v4c.custom_ops import DOMAIN

from .rewriting import GraphPass


class FuseNormProjection(GraphPass):
    """``MatMul(RMSNormalization(x, norm), Transpose(weight))`` -> ``RMSNormLinear(x, norm, weight)``.

    It stands after `merge-projections`, so that one product is all that reads the norm.
    """

    pass_name = "fuse-norm-projection"

    def pattern(self, op: Any, x: Any, norm: Any, weight: Any) -> Any:
        normed = op.RMSNormalization(x, norm, _outputs=["normed"])
        return op.MatMul(normed, op.Transpose(weight, _outputs=["transposed"]))

    def check(
        self, context: Any, x: ir.Value, norm: ir.Value, weight: ir.Value, normed: ir.Value, transposed: ir.Value
    ) -> Any:
        node = normed.producer()
        transpose = transposed.producer()
        assert node is not None
        assert transpose is not None
        axis = node.attributes["axis"].value if "axis" in node.attributes else -1
        if axis != -1:
            return self.refuse(node, "a norm over the last axis", f"axis {axis}")
        if norm.shape is None or len(norm.shape) != 1:
            return self.refuse(node, "a norm weight of rank 1", norm.shape)
        if list(transpose.attributes["perm"].value) != [1, 0]:
            return self.refuse(transpose, "a weight [N, K], transposed", list(transpose.attributes["perm"].value))
        return True

    def rewrite(
        self, op: Any, x: ir.Value, norm: ir.Value, weight: ir.Value, normed: ir.Value, transposed: ir.Value
    ) -> Any:
        attributes = normed.producer().attributes  # type: ignore[union-attr]
        eps = attributes["epsilon"].value if "epsilon" in attributes else 1e-5
        return op.RMSNormLinear(x, norm, weight, eps=eps, _domain=DOMAIN)
