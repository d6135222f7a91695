"""``hoist-token-work``: what depends on the tokens alone leaves the layers and stands at the head of the graph.

Hash routes and Engram addresses and rows need the token ids, not the activations. At the head, a target can fetch the
rows while the first layers run, and a runtime with experts on disk knows early which ones it will need.
"""

from __future__ import annotations

import onnx_ir as ir

from v4c.custom_ops import DOMAIN

from .hoisting import calls, hoist, parts
from .rewriting import PassReport

_WORTH_HOISTING = {("", "Gather"), (DOMAIN, "EngramHash"), (DOMAIN, "EngramLookup")}


class HoistTokenWork:
    """Lookups in tables by token id move from the layer functions to the head of the main graph.

    A node moves when everything it reads is an input or weight of the main graph, a constant, or moves too.
    """

    pass_name = "hoist-token-work"

    def run(self, model: ir.Model) -> PassReport:
        """Rewrite `model` in place."""
        clones: list[ir.Node] = []
        moved = 0
        for function in parts(model):
            nodes = _token_work(function, _given(model, function))
            if nodes:
                clones += hoist(model, function, nodes)
                moved += len(nodes)
        first = next((n for n in model.graph if n not in set(clones)), None)
        if clones and first is not None:
            model.graph.remove(clones)
            model.graph.insert_before(first, clones)
            model.graph.sort()  # a stored table may have to be cast first
        return PassReport(self.pass_name, moved)


def _given(model: ir.Model, function: ir.Function) -> set[ir.Value]:
    """Inputs of the function that every call passes straight from the main graph's inputs and weights."""
    sites = calls(model, function)
    return {
        formal for index, formal in enumerate(function.inputs) if all(_is_given(call.inputs[index]) for call in sites)
    }


def _is_given(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    # A stored weight may be cast where it is passed.
    return producer is None or (producer.op_type == "Cast" and _is_given(producer.inputs[0]))


def _token_work(function: ir.Function, given: set[ir.Value]) -> list[ir.Node]:
    """The nodes to move, in order: lookups that depend on `given` alone."""
    ready, moved = set(given), []
    for node in function:
        if node.op_type == "Constant":
            ready.update(node.outputs)
        elif (node.domain, node.op_type) in _WORTH_HOISTING and all(v in ready for v in node.inputs):
            ready.update(node.outputs)
            moved.append(node)
    return moved
