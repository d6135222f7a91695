"""How weights are laid out for a target, decided from how the graph uses them.

A weight that only feeds a product is packed for that product; an expert stack for the grouped experts; a table that is
only gathered from keeps its shape but may be stored in half precision; everything else stays as it is, in float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

import onnx_ir as ir

from v4c.custom_ops import DOMAIN
from v4c.passes.onnx.rewriting import constant


class Layout(StrEnum):
    """What a weight is used as."""

    PLAIN = "plain"  # any shape, float32 or int64
    TABLE = "table"  # rows are gathered
    LINEAR = "linear"  # [N, K], y = x @ w.T
    LINEAR_KN = "linear_kn"  # [K, N], y = x @ w
    GROUPED_LINEAR = "grouped_linear"  # [G * N, K], block-diagonal
    EXPERTS_GATE_UP = "experts_gate_up"  # [E, 2F, D]
    EXPERTS_DOWN = "experts_down"  # [E, D, F]


MATRIX_LAYOUTS = frozenset(Layout) - {Layout.PLAIN}
"""Layouts whose storage dtype the user chooses."""


@dataclass(frozen=True)
class WeightSpec:
    """One weight a compiled function takes: where it comes from and how it is stored.

    Attributes:
        name: tensor name in the checkpoint or ONNX file.
        layout: how it is packed.
        shape: shape before packing.
        groups: number of diagonal blocks (`Layout.GROUPED_LINEAR` only, else 1).
        dtype: storage dtype: ``float32``, ``bfloat16`` or ``int64``.
    """

    name: str
    layout: Layout
    shape: tuple[int, ...]
    groups: int
    dtype: str


def uses(nodes: Iterable[ir.Node]) -> dict[str, list[tuple[ir.Node, int]]]:
    """Consumers of every value by name: (node, input index)."""
    found: dict[str, list[tuple[ir.Node, int]]] = {}
    for node in nodes:
        for index, value in enumerate(node.inputs):
            if value is not None and value.name is not None:
                found.setdefault(value.name, []).append((node, index))
    return found


Consumers = Mapping[str, list[tuple[ir.Node, int]]]


@dataclass(frozen=True)
class Callee:
    """A model-local function and the consumers of its values."""

    function: ir.Function
    consumers: Consumers


Callees = Mapping[tuple[str, str], Callee]
"""(domain, name) to model-local function."""


def layout_of(value: str, consumers: Consumers, functions: Callees) -> tuple[Layout, int]:
    """Layout and number of groups for weight `value`; PLAIN where its uses disagree or are not recognised.

    Args:
        value: name of the weight in this graph.
        consumers: as `uses` gives them.
        functions: for weights handed on to a model-local function.
    """
    found = {_one(node, index, consumers, functions) for node, index in consumers.get(value, [])}
    return found.pop() if len(found) == 1 else (Layout.PLAIN, 1)


def _one(node: ir.Node, index: int, consumers: Consumers, functions: Callees) -> tuple[Layout, int]:
    key = (node.domain, node.op_type)
    plain = (Layout.PLAIN, 1)
    if key in functions and node.domain != DOMAIN:
        callee = functions[key]
        name = callee.function.inputs[index].name
        assert name is not None
        return layout_of(name, callee.consumers, functions)
    if key == ("", "Cast"):
        return _through(node, consumers, functions)
    if key == ("", "MatMul") and index == 1:
        return Layout.LINEAR_KN, 1
    if key == ("", "Gather") and index == 0:
        return Layout.TABLE, 1
    if key == (DOMAIN, "EngramLookup") and index == 0:
        return Layout.TABLE, 1
    if key == (DOMAIN, "GroupedExperts") and index in (3, 4):
        return (Layout.EXPERTS_GATE_UP if index == 3 else Layout.EXPERTS_DOWN), 1
    if key == ("", "Transpose") and list(node.attributes["perm"].value) == [1, 0]:
        return (Layout.LINEAR, 1) if _feeds_matmul(node, consumers) else plain
    if key == ("", "Reshape") and index == 0:
        shape = constant(node.inputs[1])
        transposes = consumers.get(str(node.outputs[0].name), [])
        if shape is not None and len(shape) == 3 and len(transposes) == 1:
            transpose = transposes[0][0]
            grouped = transpose.op_type == "Transpose" and list(transpose.attributes["perm"].value) == [0, 2, 1]
            if grouped and _feeds_matmul(transpose, consumers):
                return Layout.GROUPED_LINEAR, int(shape[0])
    return plain


def _through(node: ir.Node, consumers: Consumers, functions: Callees) -> tuple[Layout, int]:
    name = node.outputs[0].name
    assert name is not None
    return layout_of(name, consumers, functions)


def _feeds_matmul(node: ir.Node, consumers: Consumers) -> bool:
    readers = consumers.get(str(node.outputs[0].name), [])
    return bool(readers) and all(n.op_type == "MatMul" and i == 1 for n, i in readers)
