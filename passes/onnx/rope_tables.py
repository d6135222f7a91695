"""Recognises tables of cosines and sines of positions, however their axes were unsqueezed, repeated or transposed.

A table is read back to the three things a rotation needs: the position of each row's first token, the number of tokens,
and the angle per position of each pair. Anything else - scaled, joined end to end, of other positions - is a Mismatch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx_ir as ir

from .arrangement import COPY, MOVES, Atom, Axes, broadcast, constant_axes, labels, moved
from .matching import Dim, Mismatch, dim, dtype_of, node_of, operand, operands, rank, scalar, sizes

ROW, TOKEN, PAIR = "row", "token", "pair"


@dataclass(frozen=True)
class Table:
    """A tensor over rows, tokens and pairs.

    Attributes:
        kind: ``start``, ``steps``, ``positions``, ``speeds``, ``angles``, ``cos`` or ``sin``.
        axes: what each axis runs over; a pair written twice in a row has a `COPY` atom behind it.
        scale: factor of a cosine or sine.
        start: the positions ``[B]`` of the rows' first tokens.
        count: the number of tokens.
        speeds: ``[R / 2]``, or a constant with further axes of size one.
    """

    kind: str
    axes: Axes
    scale: float = 1.0
    start: ir.Value | None = None
    count: Dim | None = None
    speeds: ir.Value | None = None

    @property
    def doubled(self) -> bool:
        """Whether every pair is written twice, next to each other: one entry per rotated dim."""
        return labels(self.axes)[-1:] == ((PAIR, COPY),)


def made_of_angles(value: ir.Value, through: tuple[str, ...] = ()) -> bool:
    """Whether a Cos or Sin stands behind `value`, past operators that scale, repeat or join, and those in `through`."""
    pending, seen = [value], 0
    while pending and seen < 64:
        seen += 1
        node = node_of(pending.pop(), "Cos", "Sin", "Neg", "Mul", "Concat", *MOVES, *through)
        if node is None:
            continue
        if node.op_type in ("Cos", "Sin"):
            return True
        every = node.op_type in ("Mul", "Concat", *through)
        pending += [v for v in (node.inputs if every else node.inputs[:1]) if v is not None]
    return False


def table_of(value: ir.Value) -> Table:
    """The table that `value` is; Mismatch where it is none, with the reason."""
    node = value.producer()
    if node is None or node.domain != "":
        return _leaf(value, node)
    if node.op_type in ("Cos", "Sin"):
        angles = _expect(node, table_of(operand(node, 0)), "angles")
        return replace(angles, kind=node.op_type.lower())
    if node.op_type == "Neg":
        table = table_of(operand(node, 0))
        return replace(_expect(node, table, "cos", "sin"), scale=-table.scale)
    if node.op_type == "Mul":
        return _product(node)
    if node.op_type == "Add" and rank(value) != 1:
        return _positions(node)
    if node.op_type == "Range":
        return _steps(node)
    if node.op_type == "Concat":
        raise Mismatch(node, "angles written twice in a row, one for each dim of a pair", "angles joined end to end")
    if node.op_type in MOVES and rank(value) != 1 and constant_axes(value, PAIR) is None:
        table = table_of(operand(node, 0))
        axes = moved(node, table.axes)
        if axes is None:
            raise Mismatch(node, "angles that are only moved or repeated", f"a {node.op_type} of another shape")
        return replace(table, axes=axes)
    return _leaf(value, node)


def _leaf(value: ir.Value, node: ir.Node | None) -> Table:
    """Positions ``[B]`` or speeds ``[R / 2]``."""
    where = node or next(iter(value.uses())).node
    kind = dtype_of(value)
    axes = constant_axes(value, PAIR)
    if axes is not None and kind == ir.DataType.FLOAT:
        return Table("speeds", axes, speeds=value)
    if rank(value) != 1:
        raise Mismatch(where, "positions [B] + arange, or speeds [R / 2]", f"{value.name} {value.shape}")
    if kind == ir.DataType.INT64:
        return Table("start", ((Atom(ROW, dim(value, 0)),),), start=value)
    if kind == ir.DataType.FLOAT and isinstance(dim(value, 0), int):
        return Table("speeds", ((Atom(PAIR, dim(value, 0)),),), speeds=value)
    raise Mismatch(where, "int64 positions or float32 speeds of known size", f"{value.name} {value.dtype}{value.shape}")


def _steps(node: ir.Node) -> Table:
    count = sizes(node.inputs[1])
    if scalar(node.inputs[0]) != 0 or scalar(node.inputs[2]) != 1 or count is None:
        raise Mismatch(node, "a Range from 0 by 1", "another one")
    return Table("steps", ((Atom(TOKEN, count[0]),),), count=count[0])


def _positions(node: ir.Node) -> Table:
    tables = [table_of(v) for v in node.inputs if v is not None]
    for first, steps in (tables, reversed(tables)):
        axes = broadcast(first.axes, steps.axes)
        if (first.kind, steps.kind) == ("start", "steps") and axes is not None:
            return Table("positions", axes, start=first.start, count=steps.count)
    raise Mismatch(node, "each row's first position + arange", "another sum")


def _product(node: ir.Node) -> Table:
    for a, b in operands(node):
        factor = scalar(b)
        if factor is not None and constant_axes(b, PAIR) is None:
            table = _expect(node, table_of(a), "cos", "sin")
            return replace(table, scale=table.scale * factor)
    tables = [table_of(v) for v in node.inputs if v is not None]
    for positions, speeds in (tables, reversed(tables)):
        axes = broadcast(positions.axes, speeds.axes)
        if (positions.kind, speeds.kind) == ("positions", "speeds") and axes is not None:
            return replace(positions, kind="angles", axes=axes, speeds=speeds.speeds)
    raise Mismatch(node, "positions times speeds", "another product")


def _expect(node: ir.Node, table: Table, *kinds: str) -> Table:
    if table.kind not in kinds:
        raise Mismatch(node, " or ".join(kinds), table.kind)
    return table


def same_angles(a: Table, b: Table) -> bool:
    """Whether two tables hold functions of the same angles, axis for axis."""
    return (a.start, a.count, a.speeds, labels(a.axes)) == (b.start, b.count, b.speeds, labels(b.axes))
