"""Reads a rotation spelled in elementwise operators back to what it does to each pair of dims.

Every value on the way is a sum of terms: some dims of x, times a cosine, a sine or nothing, times a sign. The two
halves of the result, those of even and those of odd dims, are such sums, whichever spelling made them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from .arrangement import Atom, labels, moved
from .columns import columns
from .matching import Mismatch, array, attribute, dim, node_of, operand, operands, plain, rank
from .rope_tables import Table, made_of_angles, same_angles, table_of

Term = tuple[tuple[int, ...], str]
"""Dims of x in order, and ``cos``, ``sin`` or nothing."""
Sum = dict[Term, float]


@dataclass
class Rotation:
    """What is known of the rotation of the trailing dims of `x` while its spelling is read.

    Attributes:
        x: the value whose dims are rotated.
        width: its last dimension.
        cos, sin: the tables, as first met.
        shared: the values that are tables.
    """

    x: ir.Value
    width: int
    cos: Table | None = None
    sin: Table | None = None
    shared: list[ir.Value] = field(default_factory=list)

    def columns(self, value: ir.Value) -> np.ndarray | None:
        """Which dims of x `value` takes; None if it is not cut out of x."""
        return columns(value, self.x, self.width)

    def halves(self, value: ir.Value) -> tuple[Sum, Sum]:
        """What `value` ``[..., R]`` holds at even and at odd dims."""
        value = plain(value)
        taken = self.columns(value)
        if taken is not None and taken.ndim == 1:
            return {(tuple(taken[0::2].tolist()), ""): 1.0}, {(tuple(taken[1::2].tolist()), ""): 1.0}
        node = node_of(value, "Reshape", "Concat", "Neg", "Add", "Sub", "Mul")
        if node is None:
            raise self._unknown(value)
        if node.op_type == "Reshape":
            return self._interleaved(node)
        if node.op_type == "Concat":
            raise Mismatch(node, "interleaved pairs (2i, 2i + 1)", "halves joined end to end (a half-split rotation)")
        if node.op_type == "Mul":
            part, table = self._factors(node, doubled=True)
            return tuple(_times(s, table) for s in self.halves(part))  # type: ignore[return-value]
        parts = [self.halves(v) for v in node.inputs if v is not None]
        return tuple(_combined(node, [p[i] for p in parts]) for i in range(2))  # type: ignore[return-value]

    def half(self, value: ir.Value) -> Sum:
        """What `value` ``[..., R / 2]`` holds."""
        value = plain(value)
        taken = self.columns(value)
        if taken is not None and taken.ndim == 1:
            return {(tuple(taken.tolist()), ""): 1.0}
        node = node_of(value, "Neg", "Add", "Sub", "Mul")
        if node is None:
            raise self._unknown(value)
        if node.op_type == "Mul":
            part, table = self._factors(node, doubled=False)
            return _times(self.half(part), table)
        return _combined(node, [self.half(v) for v in node.inputs if v is not None])

    def _interleaved(self, node: ir.Node) -> tuple[Sum, Sum]:
        """``Reshape(Concat(Unsqueeze(a), Unsqueeze(b)))``: a at even dims, b at odd ones."""
        stack = node_of(operand(node, 0), "Concat")
        parts = [node_of(v, "Unsqueeze") for v in stack.inputs] if stack is not None else []
        inner = [operand(p, 0) for p in parts if p is not None]
        if stack is None or len(inner) != 2 or len(parts) != 2:
            raise self._unknown(node.outputs[0])
        count = rank(self.x)
        assert count is not None
        axis = attribute(stack, "axis")
        places = [array(p.inputs[1]) for p in parts if p is not None]
        if axis not in (-1, count) or any(p is None or p.reshape(-1).tolist() not in ([-1], [count]) for p in places):
            raise Mismatch(stack, "a stack along a new last axis: interleaved pairs", f"axis {axis}")
        even, odd = self.half(inner[0]), self.half(inner[1])
        pairs = len(next(iter(even))[0])
        lead = tuple((Atom(str(i), dim(self.x, i)),) for i in range(count - 1))
        axes = moved(node, (*lead, (Atom("pair", pairs),), (Atom("part", 2),)))
        if axes is None or labels(axes) != (*labels(lead), ("pair", "part")):
            raise Mismatch(node, "the last two axes flattened into one", "another Reshape")
        return even, odd

    def _factors(self, node: ir.Node, doubled: bool) -> tuple[ir.Value, Table]:
        """The part of x and the table of a product."""
        for part, factor in operands(node):
            if not made_of_angles(factor):
                continue
            table = table_of(factor)
            if table.kind not in ("cos", "sin") or table.doubled != doubled:
                raise Mismatch(
                    node, "a cosine or sine for every dim of its factor", f"{table.kind} {labels(table.axes)}"
                )
            known: Table | None = getattr(self, table.kind)
            if known is not None and (known.scale != table.scale or not same_angles(known, table)):
                raise Mismatch(node, "one table of angles", "another one than before")
            setattr(self, table.kind, table)
            self.shared.append(factor)
            return part, table
        raise self._unknown(node.outputs[0])

    def _unknown(self, value: ir.Value) -> Mismatch:
        node = value.producer()
        where = node or next(iter(value.uses())).node
        found = f"{value.name}, made by {node.op_type}" if node is not None else f"{value.name}"
        return Mismatch(where, "sums and products of dims of one tensor with cosines and sines", found)


def _times(terms: Sum, table: Table) -> Sum:
    return {(dims, table.kind if not trig else f"{trig}*{table.kind}"): c for (dims, trig), c in terms.items()}


def _combined(node: ir.Node, parts: list[Sum]) -> Sum:
    """Neg, Add or Sub of sums."""
    signs = [-1.0] if node.op_type == "Neg" else [1.0, -1.0 if node.op_type == "Sub" else 1.0]
    made: Sum = {}
    for part, sign in zip(parts, signs, strict=True):
        for term, coefficient in part.items():
            made[term] = made.get(term, 0.0) + sign * coefficient
    return made
