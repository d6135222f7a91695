"""``fuse-swiglu``: the shared expert's clamped SwiGLU, five elementwise operators, becomes one `ClampedSwiGLU`."""

from __future__ import annotations

import onnx_ir as ir

from v4c.custom_ops import DOMAIN

from .matching import Fusion, WalkPass, new_node, node_of
from .swiglu_spelling import clamped_swiglu


class FuseSwiGLU(WalkPass):
    """``min(gate, limit) * Sigmoid(min(gate, limit)) * clip(up, -limit, limit)`` -> ``ClampedSwiGLU(gate, up)``.

    Accepted: see `clamped_swiglu`; our own function body is among the spellings. It stands before import: the target
    has one vectorised kernel for it, where the generic elementwise lowering calls the C library's ``exp`` once per
    element.
    """

    pass_name = "fuse-swiglu"
    anchors = frozenset(("Mul",))

    def find(self, node: ir.Node) -> Fusion | None:
        """The SwiGLU whose last product is `node`."""
        glu = clamped_swiglu(node.outputs[0]) if node_of(node.outputs[0], "Mul") is not None else None
        if glu is None:
            return None
        fused = new_node("ClampedSwiGLU", [glu.gate, glu.up], {"limit": glu.limit}, domain=DOMAIN)
        return Fusion([fused], {node.outputs[0]: fused.outputs[0]})
