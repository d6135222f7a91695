"""What the passes that recognise handed-in spellings share: reading values, and replacing what was recognised.

A spelling has too many small variants for one pattern each, so these passes walk from an anchor node along producers.
`WalkPass` does the rest: it checks that nothing of the old spelling is read elsewhere, and swaps it for the new nodes.
"""

from __future__ import annotations

import abc
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from v4c.custom_ops.base import DOMAIN, ONNX_OPSET, OPSET_VERSION

from .rewriting import PassReport

_SMALL = 1 << 16
"""Constants of at most this many elements are read; larger ones are weights, which no pattern depends on."""

_FIRST_INPUT_ONLY = frozenset(
    ("Reshape", "Expand", "Slice", "Unsqueeze", "Squeeze", "Split", "ReduceSum", "ReduceMean", "TopK", "CastLike")
)
"""Operators whose later inputs are shapes, axes and the like: often shared, never part of a spelling."""

Dim = int | str | tuple[ir.Value, int]
"""One dimension: its size, its symbol, or, unnamed, the value and the axis (or element) it was read from."""


class Mismatch(Exception):  # not an error: a place that looks right and is not
    """A place that looks right and is not: the node, what was expected, what was found."""

    def __init__(self, node: ir.Node, expected: str, found: Any) -> None:
        super().__init__(f"{node.name}: expected {expected}, found {found}")


@dataclass(frozen=True)
class Fusion:
    """A spelling that was recognised.

    Attributes:
        nodes: what stands in its place, in order.
        replaced: each value of the spelling that is read by others, and the one that is read from now on.
        shared: values inside the spelling that others may read too, such as tables of angles.
    """

    nodes: list[ir.Node]
    replaced: dict[ir.Value, ir.Value]
    shared: Collection[ir.Value] = field(default_factory=tuple)

    def interior(self) -> list[ir.Node]:
        """The nodes of the spelling that nothing else may read: they go."""
        made = {v for n in self.nodes for v in n.outputs}
        borders = {v for n in self.nodes for v in n.inputs if v is not None and v not in made} | set(self.shared)
        found: dict[ir.Node, None] = {}
        pending = list(self.replaced)
        while pending:
            value = pending.pop()
            node = value.producer()
            if node is None or value in borders or node in found or node.op_type in ("Constant", "Shape"):
                continue
            found[node] = None
            followed = node.inputs[:1] if node.op_type in _FIRST_INPUT_ONLY else node.inputs
            pending.extend(v for v in followed if v is not None)
        return list(found)

    def check_closed(self) -> None:
        """Raises: Mismatch where a value inside is read outside."""
        interior = self.interior()
        inside = set(interior)
        for node in interior:
            if node.graph is not interior[0].graph:
                raise Mismatch(node, "all of the spelling in one graph", "a part outside of it")
            for value in node.outputs:
                if value in self.replaced:
                    continue
                readers = [u.node.name for u in value.uses() if u.node not in inside]
                if readers or value.is_graph_output():
                    raise Mismatch(
                        node, f"{value.name} to be read here only", f"it is read by {readers or 'an output'}"
                    )

    def abandon(self) -> None:
        """Let go of what the new nodes read, so that they do not count among its readers."""
        for node in self.nodes:
            node.resize_inputs(0)

    def apply(self, anchor: ir.Node) -> None:
        """Put the new nodes before `anchor`, hand over the uses, and drop the old ones; the graph needs a sort."""
        graph, interior = anchor.graph, self.interior()
        assert graph is not None
        graph.insert_before(anchor, self.nodes)
        for old, new in self.replaced.items():
            new.type = old.type or new.type
            new.shape = old.shape if old.shape is not None else new.shape
            old.replace_all_uses_with(new, replace_graph_outputs=True)
            new.name, old.name = old.name, f"{old.name}.unfused"
        _drop(graph, interior)


def _drop(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    """Remove `nodes`, and whatever fed only them."""
    graph.remove(pending := list(nodes), safe=False)
    while pending:
        node = pending.pop()
        for index, value in enumerate(node.inputs):
            node.replace_input_with(index, None)
            producer = value.producer() if value is not None else None
            if producer is None or producer.graph is not graph:
                continue
            if not any(v.uses() or v.is_graph_output() for v in producer.outputs):
                graph.remove(producer)
                pending.append(producer)


class WalkPass(abc.ABC):
    """Base of the passes that walk: subclasses give `pass_name`, `anchors` and `find`."""

    pass_name: str
    anchors: frozenset[str]
    """Operators, standard ones or ours, at which `find` looks."""

    def __init__(self) -> None:
        self.refusals: list[str] = []

    @abc.abstractmethod
    def find(self, node: ir.Node) -> Fusion | None:
        """The spelling around an anchor, None where there is none; Mismatch where there nearly is."""

    def run(self, model: ir.Model) -> PassReport:
        """Rewrite `model` in place: main graph and functions, but not the bodies of custom ops.

        Functions with attribute parameters are left alone, for their attributes have no values here, and so is whatever
        is written for an older opset than the ops are.
        """
        count = 0
        parts: list[ir.Graph | ir.Function] = [model.graph]
        parts += [f for f in model.functions.values() if f.domain != DOMAIN and not f.attributes]
        for part in parts:
            before = count
            opset = part.opset_imports.get("", ONNX_OPSET)
            if opset < ONNX_OPSET:
                self.refusals.append(f"{part.name}: expected opset {ONNX_OPSET} or later, found {opset}")
                continue
            for node in list(ir.traversal.RecursiveGraphIterator(part)):
                if node.graph is None or node.domain not in ("", DOMAIN) or node.op_type not in self.anchors:
                    continue
                fusion = None
                try:
                    fusion = self.find(node)
                    if fusion is not None:
                        fusion.check_closed()
                        fusion.apply(node)
                        count += 1
                except Mismatch as reason:
                    self.refusals.append(str(reason))
                    if fusion is not None:
                        fusion.abandon()
            if count > before:
                part.opset_imports.setdefault(DOMAIN, OPSET_VERSION)
                part.sort()
        if count:
            model.graph.opset_imports.setdefault(DOMAIN, OPSET_VERSION)
        return PassReport(self.pass_name, count, self.refusals)


def node_of(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The standard operator that makes `value`, if it is one of `op_types`."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.domain == "" and node.op_type in op_types else None


def operand(node: ir.Node, index: int) -> ir.Value:
    """An input that must be there."""
    value = node.inputs[index]
    assert value is not None
    return value


def operands(node: ir.Node) -> Iterator[tuple[ir.Value, ir.Value]]:
    """Both orders of the inputs of a commutative operator."""
    a, b = operand(node, 0), operand(node, 1)
    yield a, b
    yield b, a


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """The value of an attribute, `default` where the node has none."""
    return node.attributes[name].value if name in node.attributes else default


def dtype_of(value: ir.Value) -> ir.DataType | None:
    """The element type, also where only the Cast or Constant that made the value tells it."""
    node = node_of(value, "Cast", "Constant") if value.dtype is None else None
    if node is None:
        return value.dtype
    if node.op_type == "Cast":
        return ir.DataType(attribute(node, "to"))
    tensor = ir.convenience.get_const_tensor(value)
    return tensor.dtype if tensor is not None else None


def plain(value: ir.Value) -> ir.Value:
    """`value` before Identity and before Casts to the type it had."""
    while True:
        node = node_of(value, "Identity", "Cast", "CastLike")
        if node is None or (node.op_type != "Identity" and dtype_of(operand(node, 0)) != dtype_of(value)):
            return value
        if node.op_type != "Identity" and dtype_of(value) is None:
            return value
        value = operand(node, 0)


def array(value: ir.Value | None) -> np.ndarray | None:
    """A small constant: an initializer, a Constant node, or what simple operators make of one."""
    if value is None or value.is_graph_input():  # an input's initializer is only its default
        return None
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is not None:
        return tensor.numpy() if tensor.size <= _SMALL else None
    node = node_of(value, "Identity", "Neg", "Cast", "Reshape", "Unsqueeze", "Squeeze")
    inner = array(node.inputs[0]) if node is not None else None
    if node is None or inner is None:
        return None
    if node.op_type == "Neg":
        return np.asarray(-inner)
    if node.op_type == "Cast":
        return inner.astype(ir.DataType(attribute(node, "to")).numpy())
    if node.op_type == "Reshape":
        target = array(node.inputs[1])
        return inner.reshape(target) if target is not None and 0 not in target else None
    if node.op_type in ("Unsqueeze", "Squeeze") and len(node.inputs) > 1:
        axes = array(node.inputs[1])
        if axes is None:
            return None
        places = tuple(int(a) for a in axes.reshape(-1))
        return np.expand_dims(inner, places) if node.op_type == "Unsqueeze" else np.squeeze(inner, places)
    return np.squeeze(inner) if node.op_type == "Squeeze" else inner


def scalar(value: ir.Value | None) -> float | None:
    """The number a constant of one element and at most one axis holds, None for anything else."""
    found = array(value)
    numeric = found is not None and found.size == 1 and found.ndim <= 1 and found.dtype.kind not in "OSU"
    return float(found.reshape(())) if found is not None and numeric else None


def rank(value: ir.Value) -> int | None:
    """The number of dimensions, None where it is not known."""
    return len(value.shape) if value.shape is not None else None


def dim(value: ir.Value, axis: int) -> Dim:
    """One dimension of a value of known rank."""
    assert value.shape is not None
    axis %= len(value.shape)
    size = value.shape[axis]
    if isinstance(size, int):
        return size
    return str(size.value) if size.value is not None else (value, axis)


def sizes(value: ir.Value | None) -> list[Dim] | None:
    """The elements of an int64 scalar or vector as dimensions: constants, input shapes, what is put together of them.

    An element that is none of these stands for itself; None where not even the length is known.
    """
    if value is None:
        return None
    known = array(value)
    if known is not None:
        return [int(v) for v in known.reshape(-1)] if known.ndim <= 1 and known.dtype.kind == "i" else None
    node = node_of(value, "Shape", "Concat", "Identity", "Cast", "Squeeze", "Unsqueeze", "Reshape", "Gather", "Slice",
                   "Add", "Sub", "Mul")  # fmt: skip
    if node is None:
        return [(value, 0)] if rank(value) == 0 else None
    if node.op_type == "Shape":
        shaped = operand(node, 0)
        count = rank(shaped)
        if count is None:
            return None
        axes = range(count)[attribute(node, "start", 0) : attribute(node, "end", count)]
        return [dim(shaped, a) for a in axes]
    if node.op_type in ("Add", "Sub", "Mul"):
        return _arithmetic(node, value)
    parts = [sizes(v) for v in (node.inputs if node.op_type == "Concat" else node.inputs[:1])]
    if any(p is None for p in parts):
        return None
    elements = [d for p in parts if p is not None for d in p]
    if node.op_type == "Gather":
        index = array(node.inputs[1])
        return [elements[int(i)] for i in index.reshape(-1)] if index is not None else None
    if node.op_type == "Slice":
        bounds = [array(v) for v in node.inputs[1:3]]
        if len(node.inputs) > 4 or any(b is None for b in bounds):
            return None
        first, last = (int(b.reshape(())) for b in bounds if b is not None)
        return elements[first:last]
    return elements


def _arithmetic(node: ir.Node, value: ir.Value) -> list[Dim] | None:
    a, b = sizes(node.inputs[0]), sizes(node.inputs[1])
    if a is None or b is None or 1 not in (len(a), len(b), len(a) - len(b) + 1):
        return None
    count = max(len(a), len(b))
    made: list[Dim] = []
    for i, (x, y) in enumerate(zip(a * count if len(a) == 1 else a, b * count if len(b) == 1 else b, strict=False)):
        if isinstance(x, int) and isinstance(y, int):
            made.append({"Add": x + y, "Sub": x - y, "Mul": x * y}[node.op_type])
        else:
            made.append((value, i))
    return made[:count]


def integers(value: ir.Value | None) -> list[int] | None:
    """An int64 scalar or vector whose elements are all known now."""
    found = sizes(value)
    numbers = [d for d in found if isinstance(d, int)] if found is not None else []
    return numbers if found is not None and len(numbers) == len(found) else None


def new_node(
    op_type: str, inputs: list[ir.Value], attributes: dict[str, Any] | None = None, *, domain: str = "",
    outputs: int = 1, shape: Iterable[Any] | None = None,
) -> ir.Node:  # fmt: skip
    """A node without a name (the graph gives it one); `shape` is that of its first, float32 output, where known."""
    node = ir.node(op_type, inputs, attributes or {}, domain=domain, num_outputs=outputs)
    if shape is not None:
        node.outputs[0].shape = ir.Shape(shape)
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    return node


def new_constant(values: Any) -> ir.Node:
    """A Constant node, as functions need: they have no initializers."""
    content = np.asarray(values)
    tensor = ir.tensor(content)
    node = ir.node("Constant", [], {"value": tensor})
    node.outputs[0].shape, node.outputs[0].type = ir.Shape(content.shape), ir.TensorType(tensor.dtype)
    return node
