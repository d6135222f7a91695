"""``open-layer-borders``: the mHC steps at both ends of a layer move to the main graph, where two layers meet.

A layer ends by writing its output back into the streams and the next begins by collapsing them; only in the graph that
calls both can `fuse-mhc-post-pre` see the two. The layer functions stay shared: weights are passed at the call.
"""

from __future__ import annotations

import onnx_ir as ir

from v4c.custom_ops import DOMAIN

from .hoisting import hoist, parts, sink
from .rewriting import PassReport


class OpenLayerBorders:
    """`MHCPost` that gives a function's output moves behind its calls, `MHCPreNorm` of a function's input before them.

    A layer that begins with something else (Engram) keeps its beginning.
    """

    pass_name = "open-layer-borders"

    def run(self, model: ir.Model) -> PassReport:
        """Rewrite `model` in place."""
        moved = 0
        for function in parts(model):
            for node in list(function):
                if node.domain != DOMAIN:
                    continue
                if node.op_type == "MHCPost" and self._is_last(function, node):
                    sink(model, function, node)
                    moved += 1
                elif node.op_type == "MHCPreNorm" and all(v in function.inputs for v in node.inputs):
                    hoist(model, function, [node])
                    moved += 1
        return PassReport(self.pass_name, moved)

    @staticmethod
    def _is_last(function: ir.Function, node: ir.Node) -> bool:
        """Whether the node's result is an output of the function and nothing else."""
        (result,) = node.outputs
        return result in function.outputs and not result.uses()
