"""Recognises a matrix ``[T, E]`` of routing weights, zero but for each token's chosen experts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from .arrangement import Axes, along, broadcast, labels, product, sources, unmoved
from .matching import Dim, Mismatch, array, attribute, dim, integers, node_of, operand, operands, plain, scalar

CHOICE, EXPERT = "choice", "expert"


@dataclass(frozen=True)
class Routing:
    """What results are weighted by.

    Attributes:
        weights, indices: ``[..., K]``.
        experts: the size of a routing matrix, None where there is none.
        zeros: what it was scattered over, which others may use too.
    """

    weights: ir.Value
    indices: ir.Value
    experts: Dim | None = None
    zeros: ir.Value | None = None


def routing_of(value: ir.Value, tokens: tuple[str, ...]) -> Routing:
    """The routing behind `value` ``[*tokens, E]``; Mismatch where there is none.

    Accepted: ``ScatterElements(zeros, indices, weights)`` along the last axis (duplicate choices of a token add up with
    ``reduction="add"``, and are not allowed without); or a OneHot of the indices, times the weights, summed over the
    choices by ReduceSum or MatMul.
    """
    value = plain(value)
    origin, path = unmoved(value)
    node = node_of(value, "ScatterElements") or node_of(origin, "ReduceSum", "MatMul")
    if node is None:
        made = value.producer()
        where = made or next(iter(value.uses())).node
        raise Mismatch(where, "routing weights scattered over the experts", f"{value.name}")
    if node.op_type == "ScatterElements":
        return _scattered(node, len(tokens), dim(value, -1))
    for a, b in operands(node) if node.op_type == "MatMul" else _factors(node):
        found = _one_hot(node, path, a, b, tokens)
        if found is not None:
            return found
    raise Mismatch(node, "routing weights times a OneHot of the indices, summed over the choices", "something else")


def _scattered(node: ir.Node, axis: int, experts: Dim) -> Routing:
    zeros = operand(node, 0)
    if not _is_zero(zeros):
        raise Mismatch(node, "weights scattered over zeros", f"{zeros.name}")
    if attribute(node, "axis", 0) not in (-1, axis):
        raise Mismatch(node, "weights scattered along the experts", f"axis {attribute(node, 'axis', 0)}")
    if attribute(node, "reduction", "none") not in ("none", "add"):
        raise Mismatch(node, "weights set or added", attribute(node, "reduction"))
    return Routing(plain(operand(node, 2)), plain(operand(node, 1)), experts, zeros)


def _is_zero(value: ir.Value) -> bool:
    known = array(value)
    if known is not None:
        return not known.any()
    node = node_of(plain(value), "ConstantOfShape", "Expand")
    if node is None:
        return False
    if node.op_type == "Expand":
        return scalar(node.inputs[0]) == 0.0
    fill = attribute(node, "value")
    return fill is None or not fill.numpy().any()


def _factors(node: ir.Node) -> list[tuple[ir.Value, ir.Value]]:
    factors = node_of(plain(operand(node, 0)), "Mul")
    return list(operands(factors)) if factors is not None else []


def _one_hot(
    node: ir.Node, path: list[ir.Node], weights: ir.Value, mask: ir.Value, tokens: tuple[str, ...]
) -> Routing | None:
    """The routing if `node` sums weights times a OneHot over the choices, and `path` leaves ``[*tokens, E]``."""
    hot = node_of(unmoved(mask)[0], "OneHot")
    if hot is None or attribute(hot, "axis", -1) not in (-1, len(tokens) + 1):
        return None
    values = array(hot.inputs[2])
    if values is None or not np.array_equal(values, [0, 1]):
        return None
    names = (*tokens, CHOICE)
    want = tuple((name,) for name in (*tokens, EXPERT))
    for source, axes in sources(weights, names):
        for _, wide in sources(mask, (*names, EXPERT)):
            summed = product(axes, wide) if node.op_type == "MatMul" else _summed(node, broadcast(axes, wide))
            left = along(path, summed)
            if left is not None and labels(left) == want:
                return Routing(source, plain(operand(hot, 0)), left[-1][0].size)
    return None


def _summed(node: ir.Node, axes: Axes | None) -> Axes | None:
    """What a ReduceSum over the choices leaves of `axes`."""
    summed = integers(node.inputs[1]) if len(node.inputs) > 1 else None
    if axes is None or summed is None or len(summed) != 1:
        return None
    place = summed[0] % len(axes)
    if labels(axes)[place] != (CHOICE,):
        return None
    kept = ((),) if attribute(node, "keepdims", 1) else ()
    return axes[:place] + kept + axes[place + 1 :]
