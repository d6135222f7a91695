"""``fuse-experts``: routed experts spelled in standard operators become one `GroupedExperts`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from v4c.custom_ops import DOMAIN

from .arrangement import COPY, Atom, Axes, along, broadcast, labels, product, sources, unmoved
from .columns import columns
from .matching import (
    Fusion,
    Mismatch,
    WalkPass,
    attribute,
    dim,
    dtype_of,
    integers,
    new_constant,
    new_node,
    node_of,
    operand,
    operands,
    rank,
)
from .routing_matrix import CHOICE, EXPERT, Routing, routing_of
from .swiglu_spelling import SwiGLU, clamped_swiglu

BOTH, WIDTH, FEATURE = "both", "width", "feature"
"""Axes of the weights: 2F, F and D."""


class FuseExperts(WalkPass):
    """A mixture of experts, of the chosen ones or of all with a mask -> ``GroupedExperts``.

    Accepted, x being ``[T, D]`` or ``[B, S, D]`` and axes moved, flattened or repeated in any way:

    - per token: weights of the chosen experts by Gather or GatherND of ``gate_up [E, 2F, D]`` and ``down [E, D, F]`` at
      the indices, each multiplied with its token (either side of the MatMul), the SwiGLU between the two products, the
      result times the routing weights, summed over the choices;
    - dense: both products for every expert, times a routing matrix ``[T, E]`` (see `routing_matrix`), summed over E.

    The gate is the first half of the first product, by Split or Slice. Indices must not be negative: an index from the
    end means an expert to Gather and none to the op; routers give none.

    It stands after `fuse-router`, so that it sees its weights; `fuse-swiglu` may stand before or after.
    """

    pass_name = "fuse-experts"
    anchors = frozenset(("ReduceSum",))

    def find(self, node: ir.Node) -> Fusion | None:
        """The mixture whose sum is `node`."""
        origin, tail = unmoved(operand(node, 0))
        weighting = node_of(origin, "Mul")
        count = rank(node.outputs[0])
        for result, factor in operands(weighting) if weighting is not None else ():
            down = _Product.of(result)
            for hidden, stack, right in down.readings() if down is not None else ():
                inner, path = unmoved(hidden)
                glu = clamped_swiglu(inner)
                if glu is None or down is None:
                    continue
                both = _source(down.node, glu)
                up = _Product.of(both)
                if up is None:
                    return None
                if count not in (2, 3):
                    raise Mismatch(node, "tokens [T] or [B, S]", f"a sum of rank {count}")
                tokens = ("row", "token")[3 - count :]
                first = _first_product(up, tokens)
                width = _half(up.node, glu, both, first.axes[-1])
                hidden_axes = along(path, (*first.axes[:-1], (width,)))
                second = _second_product(down, stack, right, hidden_axes, first, tokens)
                return _fusion(node, tail, glu.limit, first, second, factor, tokens)
        return None


@dataclass(frozen=True)
class _Product:
    """A MatMul and the operators that move its result."""

    node: ir.Node
    path: list[ir.Node]

    @classmethod
    def of(cls, value: ir.Value) -> _Product | None:
        origin, path = unmoved(value)
        node = node_of(origin, "MatMul")
        return cls(node, path) if node is not None else None

    def readings(self) -> Iterator[tuple[ir.Value, ir.Value, bool]]:
        """Activation, weights, and whether the weights are the right operand."""
        for index, (a, b) in enumerate(operands(self.node)):
            yield a, b, index == 0

    def axes(self, activation: Axes, stack: Axes, right: bool) -> Axes | None:
        """Axes of the moved result."""
        return along(self.path, product(activation, stack) if right else product(stack, activation))


@dataclass(frozen=True)
class _Stack:
    """Weights as one operand of a product: the parameter ``[E, ...]``, the indices of a gather, and the axes."""

    parameter: ir.Value
    indices: ir.Value | None
    axes: Axes


@dataclass(frozen=True)
class _Step:
    """A product that was recognised; `axes` are those of its moved result."""

    x: ir.Value
    stack: _Stack
    axes: Axes


def _stacks(value: ir.Value, tokens: tuple[str, ...], names: tuple[str, str, str]) -> Iterator[_Stack]:
    """Ways to read an operand as weights of the chosen experts, or of all."""
    origin, path = unmoved(value)
    gather = node_of(origin, "Gather", "GatherND")
    if gather is None:
        yield from (_Stack(parameter, None, axes) for parameter, axes in sources(value, names))
        return
    indexed = 0 if gather.op_type == "Gather" else 1  # GatherND has the index in an axis of its own
    if attribute(gather, "axis", 0) != 0 or attribute(gather, "batch_dims", 0) != 0:
        return
    for parameter, rows in sources(operand(gather, 0), names):
        for indices, places in sources(operand(gather, 1), (*tokens, CHOICE)):
            if labels(rows[:1]) != ((EXPERT,),) or (indexed and places[-1] != ()):
                continue
            axes = along(path, (*places[: len(places) - indexed], *rows[1:]))
            if axes is not None:
                yield _Stack(parameter, indices, axes)


def _first_product(up: _Product, tokens: tuple[str, ...]) -> _Step:
    """x times gate_up."""
    for activation, weights, right in up.readings():
        for stack in _stacks(weights, tokens, (EXPERT, BOTH, FEATURE)):
            for x, moved in sources(activation, (*tokens, FEATURE)):
                axes = up.axes(_repeated(moved, stack), stack.axes, right)
                if axes is not None and labels(axes[-1:]) == ((BOTH,),):
                    return _Step(x, stack, axes)
    raise Mismatch(up.node, "x [.., D] times gate_up [E, 2F, D] of the chosen experts, or of all", _shapes(up.node))


def _second_product(
    down: _Product, weights: ir.Value, right: bool, hidden: Axes | None, first: _Step, tokens: tuple[str, ...]
) -> _Step:
    """What the SwiGLU gives times down."""
    for stack in _stacks(weights, tokens, (EXPERT, FEATURE, WIDTH)) if hidden is not None else ():
        assert hidden is not None
        axes = down.axes(hidden, stack.axes, right)
        if axes is not None and labels(axes[-1:]) == ((FEATURE,),) and stack.indices is first.stack.indices:
            return _Step(first.x, stack, axes)
    raise Mismatch(down.node, "the SwiGLU times down [E, D, F] of the same experts", _shapes(down.node))


def _fusion(
    node: ir.Node, tail: list[ir.Node], limit: float, first: _Step, second: _Step, factor: ir.Value,
    tokens: tuple[str, ...],
) -> Fusion:  # fmt: skip
    summed = integers(node.inputs[1]) if len(node.inputs) > 1 else None
    if attribute(node, "keepdims", 1) != 0 or summed is None or len(summed) != 1:
        raise Mismatch(node, "a sum over one axis, which it drops", f"axes {summed}")
    over = EXPERT if first.stack.indices is None else CHOICE
    routing = None
    for source, moved in sources(factor, (*tokens, over)):
        axes = along(tail, broadcast(second.axes, moved))
        if axes is None:
            continue
        place = summed[0] % len(axes)
        left = labels(axes[:place] + axes[place + 1 :])
        if labels(axes)[place] == (over,) and left == tuple((name,) for name in (*tokens, FEATURE)):
            indices = first.stack.indices
            routing = Routing(source, indices) if indices is not None else routing_of(source, tokens)
            break
    if routing is None:
        raise Mismatch(node, f"results times a weight for every token and {over}, summed over the {over}s", factor.name)
    return _grouped(node, limit, first, second, routing)


def _grouped(node: ir.Node, limit: float, first: _Step, second: _Step, routing: Routing) -> Fusion:
    """`GroupedExperts` in place; a flat list of tokens is a batch of one."""
    values = [first.x, routing.weights, routing.indices]
    types = [dtype_of(v) for v in values]
    if types != [ir.DataType.FLOAT, ir.DataType.FLOAT, ir.DataType.INT64]:
        raise Mismatch(node, "float32 tokens and weights, int64 indices", types)
    # A size of one would be broadcast by the spelling, and not by the op.
    x, weights, indices = ([dim(v, i) for i in range(len(v.shape or ()))] for v in values)
    if not x[:-1] == weights[:-1] == indices[:-1] or weights != indices:
        raise Mismatch(node, "tokens, weights and indices of the same tokens", f"{x}, {weights}, {indices}")
    stacks = [dim(v, 0) for v in (first.stack.parameter, second.stack.parameter)]
    if stacks[0] != stacks[1] or routing.experts not in (None, stacks[0]):
        found = f"{stacks} and routing of {routing.experts}"
        raise Mismatch(node, "gate_up and down of as many experts as are routed", found)
    nodes: list[ir.Node] = []
    flat = len(x) == 2
    if flat:
        axis = new_constant(np.array([0], np.int64))
        nodes.append(axis)
        for index, value in enumerate(values):
            wide = new_node("Unsqueeze", [value, axis.outputs[0]], shape=[1, *(value.shape or ())])
            wide.outputs[0].type = value.type
            values[index] = wide.outputs[0]
            nodes.append(wide)
    inputs = [*values, first.stack.parameter, second.stack.parameter]
    shape = values[0].shape
    nodes.append(new_node("GroupedExperts", inputs, {"limit": limit}, domain=DOMAIN, shape=shape))
    if flat:
        nodes.append(new_node("Squeeze", [nodes[-1].outputs[0], axis.outputs[0]]))
    shared = [routing.zeros] if routing.zeros is not None else []
    return Fusion(nodes, {node.outputs[0]: nodes[-1].outputs[0]}, shared)


def _repeated(axes: Axes, stack: _Stack) -> Axes:
    """Copies of a token, one per choice or per expert, called so where there are as many as the weights have."""
    names = {a.label: a.size for group in stack.axes for a in group}
    over = EXPERT if stack.indices is None else CHOICE

    def renamed(atom: Atom) -> Atom:
        return replace(atom, label=over) if atom.label == COPY and atom.size == names.get(over) else atom

    return tuple(tuple(renamed(a) for a in group) for group in axes)


def _source(node: ir.Node, glu: SwiGLU) -> ir.Value:
    """The value that the gate and up of a SwiGLU are cut out of."""
    cuts = [node_of(v, "Split", "Slice") for v in (glu.gate, glu.up)]
    sources = [operand(c, 0) for c in cuts if c is not None]
    if len(sources) != 2 or sources[0] is not sources[1]:
        raise Mismatch(node, "the gate and up as the two halves of one product", f"{glu.gate.name} and {glu.up.name}")
    return sources[0]


def _half(node: ir.Node, glu: SwiGLU, source: ir.Value, group: tuple[Atom, ...]) -> Atom:
    """The axis of a half of the first product, the gate being the first; Mismatch where it is not."""
    (both,) = group
    if not isinstance(both.size, int):
        raise Mismatch(node, "a known expert width", both.size)
    width = both.size // 2
    found = [columns(v, source, both.size) for v in (glu.gate, glu.up)]
    halves = [p.tolist() for p in found if p is not None]
    if halves != [list(range(width)), list(range(width, both.size))]:
        raise Mismatch(node, f"the gate in columns 0 ... {width} and up in those after", "other columns")
    return Atom(WIDTH, width)


def _shapes(node: ir.Node) -> str:
    return " times ".join(f"{v.name} {v.shape}" for v in node.inputs if v is not None)
