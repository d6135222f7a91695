"""``fuse-index-rope``: the rotation of the indexer's queries and the indexer become one `RotaryLightningIndex`."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from v4c.custom_ops import DOMAIN

from .rewriting import GraphPass


class FuseIndexRope(GraphPass):
    """``LightningIndex(TrailingRope(q, positions, inv_freq, sign=1), ...)``, both at the same positions.

    It stands before import, where kernels are chosen: the indexer transposes its queries in any case, and rotating them
    on that way saves a launch and a round trip through memory.
    """

    pass_name = "fuse-index-rope"

    def pattern(
        self,
        op: Any,
        q: Any,
        turned_at: Any,
        inv_freq: Any,
        weights: Any,
        index_rows: Any,
        positions: Any,
        lengths: Any,
    ) -> Any:
        rotated = op.TrailingRope(q, turned_at, inv_freq, _domain=DOMAIN, _outputs=["rotated"])
        return op.LightningIndex(rotated, weights, index_rows, positions, lengths, _domain=DOMAIN, _outputs=["indices"])

    def check(
        self, context: Any, rotated: ir.Value, indices: ir.Value, turned_at: ir.Value, positions: ir.Value, **_: Any
    ) -> Any:
        rotation, node = rotated.producer(), indices.producer()
        assert rotation is not None
        sign = rotation.attributes["sign"].value
        if sign != 1.0:
            return self.refuse(node, "queries rotated forward", f"sign {sign}")
        if turned_at is not positions:
            return self.refuse(node, f"queries rotated by {positions.name}", turned_at.name)
        return True

    def rewrite(
        self, op: Any, q: ir.Value, inv_freq: ir.Value, weights: ir.Value, index_rows: ir.Value, positions: ir.Value,
        lengths: ir.Value, indices: ir.Value, **_: Any,
    ) -> Any:  # fmt: skip
        node = indices.producer()
        assert node is not None
        sizes = {name: node.attributes[name].value for name in ("ratio", "top_k")}
        return op.RotaryLightningIndex(q, weights, index_rows, positions, lengths, inv_freq, **sizes, _domain=DOMAIN)
