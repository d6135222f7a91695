"""Follows axes through operators that only move data: which axis of a value holds which axes of where it came from.

An axis is a group of atoms in row-major order: a flattened axis has several, an axis of size one has none, and what
Expand repeats is an atom of its own. So a repeat, a flatten or a transpose spelled in any way is told from a lookalike.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from .matching import Dim, array, attribute, dim, dtype_of, node_of, operand, plain, rank, sizes

_WIDENED: dict[ir.DataType | None, tuple[ir.DataType | None, ...]] = {
    # None: a type that is not written down, as in inlined bodies; what such a value comes from is checked on its own.
    ir.DataType.FLOAT: (None, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.INT64, ir.DataType.INT32),
    ir.DataType.INT64: (ir.DataType.INT32,),
}

COPY = "copy"
"""Label of an atom that Expand made: the same data again."""


@dataclass(frozen=True)
class Atom:
    """A whole axis of the value the walk began at: what it is called, and its size."""

    label: str
    size: Dim


Axes = tuple[tuple[Atom, ...], ...]


def labels(axes: Axes) -> tuple[tuple[str, ...], ...]:
    """The names alone."""
    return tuple(tuple(atom.label for atom in group) for group in axes)


def moved(node: ir.Node, axes: Axes) -> Axes | None:
    """Axes of the node's output, from those of its first input; None if it does not merely move data."""
    if node.op_type == "Identity":
        return axes
    if node.op_type in ("Cast", "CastLike"):
        return axes if _widens(node) else None
    if node.op_type == "Transpose":
        perm = attribute(node, "perm", tuple(reversed(range(len(axes)))))
        return tuple(axes[i] for i in perm)
    target = sizes(node.inputs[1]) if len(node.inputs) > 1 else None
    if node.op_type == "Flatten":
        split = attribute(node, "axis", 1) % (len(axes) + 1)
        return tuple(tuple(a for group in part for a in group) for part in (axes[:split], axes[split:]))
    if target is None:
        return None
    if node.op_type == "Reshape":
        return _regrouped(axes, target, zero_copies=attribute(node, "allowzero", 0) == 0)
    if node.op_type == "Expand":
        return _expanded(axes, target)
    places = [d for d in target if isinstance(d, int)]
    if node.op_type == "Unsqueeze":
        made = len(axes) + len(places)
        inserted, rest = {p % made for p in places}, iter(axes)
        return tuple(() if i in inserted else next(rest) for i in range(made))
    if node.op_type == "Squeeze":
        dropped = {p % len(axes) for p in places}
        if any(atom.size != 1 for i in dropped for atom in axes[i]):
            return None
        return tuple(group for i, group in enumerate(axes) if i not in dropped)
    return None


MOVES = ("Identity", "Cast", "CastLike", "Transpose", "Reshape", "Expand", "Unsqueeze", "Squeeze", "Flatten")
"""The operators `moved` knows."""


def _widens(node: ir.Node) -> bool:
    """Whether a cast keeps every value: to float32 from shorter floats and integers, to int64 from int32."""
    source = dtype_of(operand(node, 0))
    target = dtype_of(node.outputs[0] if node.op_type == "Cast" else operand(node, 1))
    return source == target or source in _WIDENED.get(target, ())


def broadcast(a: Axes, b: Axes) -> Axes | None:
    """Axes of an elementwise result; None if two axes that meet are not the same, and neither is of size one."""
    count = max(len(a), len(b))
    made = []
    for x, y in zip(((),) * (count - len(a)) + a, ((),) * (count - len(b)) + b, strict=True):
        if x and y and labels((x,)) != labels((y,)):
            return None
        made.append(x or y)
    return tuple(made)


def product(a: Axes, b: Axes) -> Axes | None:
    """Axes of ``MatMul(a, b)``, both of rank two or more; None if the axes summed over are not the same."""
    if min(len(a), len(b)) < 2 or not a[-1] or labels(a[-1:]) != labels(b[-2:-1]):
        return None
    batch = broadcast(a[:-2], b[:-2])
    return (*batch, a[-2], b[-1]) if batch is not None else None


def unmoved(value: ir.Value) -> tuple[ir.Value, list[ir.Node]]:
    """Where the data of `value` was made, and the operators that moved it since, first to last."""
    path: list[ir.Node] = []
    while (node := node_of(value, *MOVES)) is not None:
        path.append(node)
        value = operand(node, 0)
    return value, path[::-1]


def along(path: Iterable[ir.Node], axes: Axes | None) -> Axes | None:
    """Axes after all operators of a path; None if one of them does not merely move data."""
    for node in path:
        axes = moved(node, axes) if axes is not None else None
    return axes


def sources(value: ir.Value, names: tuple[str, ...]) -> Iterator[tuple[ir.Value, Axes]]:
    """Values of rank ``len(names)`` that `value` is merely moved data of, nearest first, and its axes in theirs."""
    path: list[ir.Node] = []
    while True:
        if rank(value) == len(names):
            own = tuple((Atom(name, dim(value, i)),) for i, name in enumerate(names))
            axes = along(reversed(path), own)
            if axes is not None:
                yield plain(value), axes
        node = node_of(value, *MOVES)
        if node is None:
            return
        path.append(node)
        value = operand(node, 0)


def _expanded(axes: Axes, target: list[Dim]) -> Axes | None:
    count = max(len(axes), len(target))
    made = []
    for group, size in zip(((),) * (count - len(axes)) + axes, [1] * (count - len(target)) + target, strict=True):
        if size == 1 or (group and _size(group) == size):
            made.append(group)
        elif not group:
            made.append((Atom(COPY, size),))
        else:
            return None
    return tuple(made)


def _regrouped(axes: Axes, target: list[Dim], zero_copies: bool) -> Axes | None:
    """Deal the atoms out to the axes of a Reshape, from both ends; what is left over is the axis given as -1."""
    atoms = [atom for group in axes for atom in group]
    wanted = list(target)
    if zero_copies:
        wanted = [_size(axes[i]) if d == 0 and i < len(axes) else d for i, d in enumerate(wanted)]
    free = wanted.index(-1) if -1 in wanted else len(wanted)
    front = [_taken(atoms, size, 0) for size in wanted[:free]]
    back = [_taken(atoms, size, -1) for size in reversed(wanted[free + 1 :])][::-1]
    if None in front or None in back or (free == len(wanted) and any(a.size != 1 for a in atoms)):
        return None
    groups = [*front, *([tuple(atoms)] if free < len(wanted) else []), *back]
    return tuple(g for g in groups if g is not None)


def _size(group: tuple[Atom, ...]) -> Dim:
    if len(group) == 1:
        return group[0].size
    product = 1
    for atom in group:
        if not isinstance(atom.size, int):
            return -2  # no size equals it: a flattened axis of run-time size
        product *= atom.size
    return product


def _taken(atoms: list[Atom], size: Dim, end: int) -> tuple[Atom, ...] | None:
    """Atoms from one end of the list that make up an axis of this size."""
    if size == 1:
        return (atoms.pop(end),) if atoms and atoms[end].size == 1 else ()
    if not isinstance(size, int):
        return (atoms.pop(end),) if atoms and atoms[end].size == size else None
    taken: list[Atom] = []
    product = 1
    while product < size and atoms and isinstance(atoms[end].size, int):
        atom = atoms.pop(end)
        product *= int(atom.size)  # type: ignore[arg-type]  # an int: asked above
        taken.insert(0 if end else len(taken), atom)
    return tuple(taken) if product == size else None


def constant_axes(value: ir.Value, name: str) -> Axes | None:
    """Axes of a constant that is a vector, whatever axes of size one it has besides."""
    found = array(value)
    if found is None or found.size != max(found.shape, default=0):
        return None
    place = found.shape.index(found.size)
    return tuple((Atom(name, found.size),) if i == place else () for i in range(found.ndim))
