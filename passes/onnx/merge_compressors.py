"""``merge-compressors``: two KV compressors over the same tokens become one `KVCompressPair`.

The two share only inputs, so this is no tree that a rewrite rule could match: the pass walks over pairs of nodes.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir
from onnx_ir.convenience import replace_nodes_and_values

from v4c.custom_ops import DOMAIN, OPS

from .rewriting import PassReport

_SINGLE = OPS["KVCompress"]
_SHARED = ("inv_freq", "positions", "lengths")
_OWN = ("kv", "gate", "bias", "norm", "state_kv", "state_gate", "rows")
_SHAPE_ONLY = frozenset({"Shape", "Size"})
"""Operators that read no element."""


class MergeCompressors:
    """Two `KVCompress` of one graph with the same ratio, eps, inv_freq, positions and lengths, neither of which reads
    what the other leaves behind, even through other nodes. The one that comes first in the graph is the pair's first.

    It stands before import, where kernels are chosen: the sparse attention's compressor and its indexer's then share a
    launch, each on a thread of its own when a decode step completes a window.
    """

    pass_name = "merge-compressors"

    def __init__(self) -> None:
        self.refusals: list[str] = []

    def run(self, model: ir.Model) -> PassReport:
        """Rewrite `model` in place: the main graph and every function that is not the body of a custom op."""
        graphs: list[ir.Graph | ir.Function] = [model.graph]
        graphs += [f for f in model.functions.values() if f.domain != DOMAIN]
        return PassReport(self.pass_name, sum(map(self._merge_in, graphs)), self.refusals)

    def _merge_in(self, graph: ir.Graph | ir.Function) -> int:
        """Merge what can be in one graph; how many pairs that were."""
        left = [n for n in graph if (n.domain, n.op_type) == (DOMAIN, _SINGLE.name)]
        count = 0
        while left:
            first = left.pop(0)
            reasons = []
            for second in left:
                reason = _obstacle(graph, first, second)
                if reason is None:
                    _merge(graph, first, second)
                    left.remove(second)
                    count += 1
                    break
                reasons.append(f"{first.name}: {reason}")
            else:
                self.refusals += reasons[:1]  # that of its neighbour; a compressor with none after it is no near miss
        return count


def _input(node: ir.Node, name: str) -> ir.Value:
    value = node.inputs[_SINGLE.inputs.index(name)]
    assert value is not None
    return value


def _obstacle(graph: ir.Graph | ir.Function, first: ir.Node, second: ir.Node) -> str | None:
    """Why `first` and `second`, in the graph's order, cannot be one op; None if they can."""
    for name in _SINGLE.attributes:
        ours, theirs = (n.attributes[name].value for n in (first, second))
        if ours != theirs:
            return f"expected {name} {theirs} as in {second.name}, found {ours}"
    for name in _SHARED:
        ours, theirs = _input(first, name), _input(second, name)
        if ours is not theirs:
            return f"expected {name} {theirs.name} as in {second.name}, found {ours.name}"
    if _depends(graph, second, first):
        return f"expected a compressor that does not depend on it, found {second.name}"
    # Nodes between the two may have to move behind the pair, which a node must not that reads a state it writes over.
    for node in (first, second):
        for state in _SINGLE.writes.values():
            for reader, _ in _input(node, state).uses():
                if reader is not node and reader.op_type not in _SHAPE_ONLY:
                    return f"expected {_input(node, state).name} read by {node.name} alone, found {reader.name}"
    return None


def _depends(graph: ir.Graph | ir.Function, second: ir.Node, first: ir.Node) -> bool:
    """Whether `second`, further on in the graph, reads what `first` gives, itself or through other nodes."""
    made = set(first.outputs)
    for node in graph:
        if not made.isdisjoint(_reads(node)):
            if node is second:
                return True
            made.update(node.outputs)
    return False


def _reads(node: ir.Node) -> Iterator[ir.Value | None]:
    """What a node reads, in its subgraphs too."""
    yield from node.inputs
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            for inner in ir.traversal.RecursiveGraphIterator(attribute.as_graph()):
                yield from inner.inputs


def _merge(graph: ir.Graph | ir.Function, first: ir.Node, second: ir.Node) -> None:
    """Put the pair where `second` stands, where the inputs of both are ready, and readers of `first` behind it."""
    inputs = [_input(node, name) for node in (first, second) for name in _OWN]
    inputs += [_input(first, name) for name in _SHARED]
    name = f"{first.name}_{second.name}"
    outputs = [*first.outputs, *second.outputs]
    attributes = list(first.attributes.values())
    pair = ir.Node(DOMAIN, "KVCompressPair", inputs, attributes, num_outputs=len(outputs), name=name)
    replace_nodes_and_values(graph, second, [first, second], [pair], outputs, pair.outputs)
    graph.sort()
