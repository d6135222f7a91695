"""Weights that the graph joins before it uses them: a Concat of weights is one weight, joined when it is packed."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import onnx_ir as ir


@dataclass(frozen=True)
class Merges:
    """The merged weights of a graph.

    Attributes:
        parts: each joining Concat and the weights it joins, in order.
        absorbed: weights that nothing reads but such a Concat.
        skipped: nodes that packing does: the Concats, and the Casts before them.
    """

    parts: dict[ir.Node, list[ir.Value]] = field(default_factory=dict)
    absorbed: frozenset[str] = frozenset()
    skipped: frozenset[ir.Node] = frozenset()


def find_merges(graph: ir.Graph, weight_names: Collection[str]) -> Merges:
    """The Concats along axis 0 of `graph` whose inputs are all weights, directly or through a Cast."""
    parts = {}
    for node in graph:
        if node.domain == "" and node.op_type == "Concat" and node.attributes["axis"].value == 0:
            origins = [origin(v) for v in node.inputs if v is not None]
            if all(v.name in weight_names for v in origins):
                parts[node] = origins
    skipped = set(parts)
    skipped |= {n for n in graph if n.op_type == "Cast" and n.outputs[0].uses() and _readers(n.outputs[0]) <= skipped}
    joined = {v for values in parts.values() for v in values}
    absorbed = frozenset(str(v.name) for v in joined if _readers(v) <= skipped)
    return Merges(parts, absorbed, frozenset(skipped))


def origin(value: ir.Value) -> ir.Value:
    """The weight behind a Cast, or the value itself."""
    node = value.producer()
    if node is not None and node.op_type == "Cast" and node.inputs[0] is not None:
        return node.inputs[0]
    return value


def _readers(value: ir.Value) -> set[ir.Node]:
    return {use.node for use in value.uses()}
