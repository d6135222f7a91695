"""Recognises a clamped SwiGLU in its spellings, as the op or as elementwise operators in any order."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from v4c.custom_ops import DOMAIN

from .matching import Mismatch, attribute, node_of, operand, operands, plain, scalar


@dataclass(frozen=True)
class SwiGLU:
    """``silu(min(gate, limit)) * clip(up, -limit, limit)``."""

    gate: ir.Value
    up: ir.Value
    limit: float


def clamped_swiglu(value: ir.Value) -> SwiGLU | None:
    """The SwiGLU that gives `value`, None if none does; Mismatch if its clamps are not ours.

    Accepted: `ClampedSwiGLU`; or the product, in any order and nesting, of ``g``, ``Sigmoid(g)`` and ``u``, where g is
    ``Clip`` or ``Min`` of the gate, u is ``Clip`` or ``Min`` and ``Max`` of the other, all with one constant limit.
    """
    value = plain(value)
    node = value.producer()
    if node is not None and (node.domain, node.op_type) == (DOMAIN, "ClampedSwiGLU"):
        return SwiGLU(operand(node, 0), operand(node, 1), attribute(node, "limit"))
    for factors in _triples(value):
        for sigmoid in factors:
            inner = node_of(sigmoid, "Sigmoid")
            clamped = plain(operand(inner, 0)) if inner is not None else None
            rest = [f for f in factors if f is not sigmoid]
            if node is None or clamped is None or len(rest) != 2 or clamped not in rest:
                continue
            other = rest[1 - rest.index(clamped)]
            gate, up = _clamped(clamped), _clamped(other)
            return SwiGLU(gate[0], up[0], _limit(node, gate[1:], up[1:]))
    return None


def _limit(node: ir.Node, gate: tuple[float | None, ...], up: tuple[float | None, ...]) -> float:
    """The one limit of clamps below and above the gate and up; Mismatch where they are others."""
    (bottom, limit), found = gate, f"gate from {gate[0]} to {gate[1]}, up from {up[0]} to {up[1]}"
    if limit is None or None in up:
        raise Mismatch(node, "constant limits above the gate and on both sides of up", found)
    if limit <= 0 or bottom is not None or up != (-limit, limit):
        raise Mismatch(node, "one limit on all sides, none below the gate", found)
    return limit


def _triples(value: ir.Value) -> Iterator[list[ir.Value]]:
    """The factors of a product of three, for every way to read it as one."""
    outer = node_of(value, "Mul")
    for part, third in operands(outer) if outer is not None else ():
        inner = node_of(plain(part), "Mul")
        if inner is not None:
            yield [plain(operand(inner, 0)), plain(operand(inner, 1)), plain(third)]


def _clamped(value: ir.Value) -> tuple[ir.Value, float | None, float | None]:
    """What is clamped by constants, and the limits below and above."""
    low, high = -math.inf, math.inf
    while True:
        value = plain(value)
        node = node_of(value, "Clip", "Min", "Max")
        bounds = _bounds(node) if node is not None else None
        if bounds is None:
            return value, low if low > -math.inf else None, high if high < math.inf else None
        value = bounds[0]
        low, high = max(low, bounds[1]), min(high, bounds[2])


def _bounds(node: ir.Node) -> tuple[ir.Value, float, float] | None:
    """The clamped value and the limits of one Clip, Min or Max; None if a limit is not constant."""
    if node.op_type == "Clip":
        given = [*node.inputs[1:], None, None][:2]
        limits = [scalar(b) for b in given]
        if any(b is not None and found is None for b, found in zip(given, limits, strict=True)):
            return None
        low, high = limits
        return operand(node, 0), -math.inf if low is None else low, math.inf if high is None else high
    for value, bound in operands(node) if len(node.inputs) == 2 else ():
        limit = scalar(bound)
        if limit is not None:
            return (value, -math.inf, limit) if node.op_type == "Min" else (value, limit, math.inf)
    return None
