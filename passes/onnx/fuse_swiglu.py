"""``fuse-swiglu``: the shared expert's clamped SwiGLU, five elementwise operators, becomes one `ClampedSwiGLU`."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from v4c.custom_ops import DOMAIN

from .rewriting import GraphPass, scalar


class FuseSwiGLU(GraphPass):
    """``Clip(gate, max) * Sigmoid(Clip(gate, max)) * Clip(up, min, max)`` with one limit, ``min == -max``.

    It stands before import: the target has one vectorised kernel for it, where the generic elementwise lowering calls
    the C library's ``exp`` once per element.
    """

    pass_name = "fuse-swiglu"

    def pattern(self, op: Any, gate: Any, up: Any, gate_high: Any, low: Any, high: Any) -> Any:
        clamped = op.Clip(gate, None, gate_high)
        return op.Mul(op.Mul(clamped, op.Sigmoid(clamped)), op.Clip(up, low, high))

    def check(
        self, context: Any, gate: ir.Value, up: ir.Value, gate_high: ir.Value, low: ir.Value, high: ir.Value
    ) -> Any:
        limits = [scalar(v) for v in (gate_high, low, high)]
        node = context.root if hasattr(context, "root") else up.producer()
        if None in limits:
            return self.refuse(node, "constant limits", "limits computed at run time")
        top, bottom, up_top = (float(v) for v in limits if v is not None)
        if not (top == up_top == -bottom and top > 0):
            return self.refuse(node, "one limit on all sides", f"gate below {top}, up from {bottom} to {up_top}")
        return True

    def rewrite(self, op: Any, gate: ir.Value, up: ir.Value, gate_high: ir.Value, low: ir.Value, high: ir.Value) -> Any:
        return op.ClampedSwiGLU(gate, up, limit=scalar(gate_high), _domain=DOMAIN)
