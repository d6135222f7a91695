"""``fuse-router``: expert routing spelled in standard operators becomes one `TopKRoute` or `HashRoute`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from v4c.custom_ops import DOMAIN

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
    plain,
    rank,
    scalar,
)

_LINEAR_FROM = 15.0
"""From here on ``softplus(x) == x`` in float32: a threshold (torch has one at 20) changes nothing."""

_TINY = 1e-20
"""What the ops add to the sum of the chosen scores; a spelling may add this much or nothing."""


class FuseRouter(WalkPass):
    """Scores ``Sqrt(Softplus(logits))`` of the chosen experts, normalised -> ``TopKRoute`` or ``HashRoute``.

    Accepted: ``GatherElements(scores, indices)`` over the last axis, divided by its ReduceSum (plus at most 1e-20) and
    multiplied by a constant; indices by ``TopK(scores + bias)``, or from a table ``[V, K]`` by Gather or GatherND.
    Softplus may be the operator, ``Log(1 + Exp(x))``, or either above a threshold of 15 or more, as torch writes it.
    Logits are ``[B, S, E]`` or ``[T, E]``. TopK may be unsorted: the op's order is then one of those it may give.

    Refused: other scores, the smallest experts, scores that something else reads. It stands before `fuse-experts`.
    """

    pass_name = "fuse-router"
    anchors = frozenset(("GatherElements",))

    def find(self, node: ir.Node) -> Fusion | None:
        """The router whose scores `node` picks."""
        indices = plain(operand(node, 1))
        choice = node_of(indices, "TopK", "Gather", "GatherND")
        division = _normalisation(node.outputs[0])
        if choice is None or division is None:
            return None
        result, scaling = _scaling(division.outputs[0])
        scores = plain(operand(node, 0))
        router = _Router(_logits(node, scores), result, indices, scaling)
        count = rank(router.logits)
        if count not in (2, 3):
            raise Mismatch(node, "logits [B, S, E] or [T, E]", f"{router.logits.name} {router.logits.shape}")
        if attribute(node, "axis", 0) not in (-1, count - 1):
            raise Mismatch(node, "experts picked along the last axis", f"axis {attribute(node, 'axis', 0)}")
        if choice.op_type == "TopK":
            return router.fusion("TopKRoute", *_top_k(choice, scores, router.logits))
        return router.fusion("HashRoute", _table(choice, router.logits), {})


@dataclass(frozen=True)
class _Router:
    """The values at the borders of a router."""

    logits: ir.Value
    weights: ir.Value
    indices: ir.Value
    scaling: float

    def fusion(self, op_type: str, others: list[ir.Value], attributes: dict[str, int]) -> Fusion:
        """Put `op_type` in place; a flat list of tokens is a batch of one."""
        inputs, nodes = [self.logits, *others], []
        count = rank(self.logits)
        axis = new_constant(np.array([0], np.int64))
        if count == 2:
            flat = inputs[:1] if op_type == "TopKRoute" else inputs[:2]
            wide = [new_node("Unsqueeze", [v, axis.outputs[0]], shape=[1, *(v.shape or ())]) for v in flat]
            for value, widened in zip(flat, wide, strict=True):
                widened.outputs[0].type = value.type
            nodes = [axis, *wide]
            inputs[: len(flat)] = [n.outputs[0] for n in wide]
        route = new_node(op_type, inputs, {**attributes, "scaling": self.scaling}, domain=DOMAIN, outputs=2)
        nodes.append(route)
        made = list(route.outputs)
        if count == 2:
            for old, new in zip((self.weights, self.indices), made, strict=True):
                new.type, new.shape = old.type, ir.Shape([1, *old.shape]) if old.shape is not None else None
            narrow = [new_node("Squeeze", [v, axis.outputs[0]]) for v in made]
            nodes += narrow
            made = [n.outputs[0] for n in narrow]
        return Fusion(nodes, {self.weights: made[0], self.indices: made[1]})


def _normalisation(chosen: ir.Value) -> ir.Node | None:
    """The Div of the chosen scores by their sum."""
    for use in chosen.uses():
        division = node_of(use.node.outputs[0], "Div")
        if division is None or use.idx != 0:
            continue
        total = plain(operand(division, 1))
        add = node_of(total, "Add")
        terms = [total] if add is None else [a for a, b in operands(add) if scalar(b) is not None]
        sums = [node_of(plain(t), "ReduceSum") for t in terms]
        for reduce in sums:
            if reduce is not None and plain(operand(reduce, 0)) is chosen:
                _check_sum(reduce, add)
                return division
    return None


def _check_sum(reduce: ir.Node, add: ir.Node | None) -> None:
    axes = integers(reduce.inputs[1]) if len(reduce.inputs) > 1 else None
    count = rank(operand(reduce, 0))
    if axes is None or len(axes) != 1 or axes[0] not in (-1, None if count is None else count - 1):
        raise Mismatch(reduce, "a sum over the chosen experts, the last axis", f"axes {axes}")
    if attribute(reduce, "keepdims", 1) != 1:
        raise Mismatch(reduce, "a sum that keeps its axis", "keepdims 0")
    tiny = next((t for v in add.inputs if (t := scalar(v)) is not None), 0.0) if add is not None else 0.0
    if not 0 <= tiny <= _TINY and add is not None:
        raise Mismatch(add, f"at most {_TINY} added to the sum", tiny)


def _scaling(value: ir.Value) -> tuple[ir.Value, float]:
    """The end of the router and its factor: the product with a constant that alone reads `value`, or `value`."""
    uses = list(value.uses())
    if len(uses) == 1 and not value.is_graph_output():
        product = node_of(uses[0].node.outputs[0], "Mul")
        factor = scalar(product.inputs[1 - uses[0].idx]) if product is not None else None
        if product is not None and factor is not None:
            return product.outputs[0], factor
    return value, 1.0


def _logits(node: ir.Node, scores: ir.Value) -> ir.Value:
    """The logits of ``Sqrt(Softplus(logits))``; Mismatch for any other scores."""
    root = node_of(scores, "Sqrt", "Pow")
    if root is None or (root.op_type == "Pow" and scalar(root.inputs[1]) != 0.5):
        found = scores.producer()
        raise Mismatch(node, "scores Sqrt(Softplus(logits))", found.op_type if found is not None else scores.name)
    inner = plain(operand(root, 0))
    logits = _softplus(inner)
    if logits is None:
        found = inner.producer()
        raise Mismatch(root, "scores Sqrt(Softplus(logits))", f"Sqrt of {found.op_type if found else inner.name}")
    if dtype_of(logits) != ir.DataType.FLOAT:
        raise Mismatch(root, "float32 logits", dtype_of(logits))
    return logits


def _softplus(value: ir.Value) -> ir.Value | None:
    """x if `value` is ``Softplus(x)`` in one of its spellings."""
    node = node_of(value, "Softplus", "Log", "Where")
    if node is None:
        return None
    if node.op_type == "Softplus":
        return plain(operand(node, 0))
    if node.op_type == "Log":
        add = node_of(plain(operand(node, 0)), "Add")
        for term, other in operands(add) if add is not None else ():
            exp = node_of(plain(term), "Exp")
            if exp is not None and scalar(other) == 1.0:
                return plain(operand(exp, 0))
        return None
    greater = node_of(plain(operand(node, 0)), "Greater", "GreaterOrEqual")
    x, inner = plain(operand(node, 1)), _softplus(plain(operand(node, 2)))
    threshold = scalar(greater.inputs[1]) if greater is not None else None
    if greater is None or threshold is None or threshold < _LINEAR_FROM or plain(operand(greater, 0)) is not x:
        return None
    return x if inner is x else None


def _top_k(choice: ir.Node, scores: ir.Value, logits: ir.Value) -> tuple[list[ir.Value], dict[str, int]]:
    """The bias, and the attribute, of a choice by biased scores."""
    count = integers(choice.inputs[1])
    if count is None or len(count) != 1:
        raise Mismatch(choice, "a constant number of experts", "one of run time")
    if attribute(choice, "largest", 1) != 1:
        raise Mismatch(choice, "the largest scores chosen", "the smallest")
    if attribute(choice, "axis", -1) not in (-1, len(logits.shape or ()) - 1):
        raise Mismatch(choice, "a choice along the last axis", f"axis {attribute(choice, 'axis')}")
    add = node_of(plain(operand(choice, 0)), "Add")
    for term, bias in operands(add) if add is not None else ():
        if plain(term) is scores:
            if rank(bias) != 1 or dim(bias, 0) != dim(logits, -1):
                raise Mismatch(choice, f"a bias [{dim(logits, -1)}]", f"{bias.name} {bias.shape}")
            return [bias], {"top_k": count[0]}
    raise Mismatch(choice, "a choice by the scores plus a bias", "by something else")


def _table(choice: ir.Node, logits: ir.Value) -> list[ir.Value]:
    """The token ids and the table of a choice by token."""
    table, ids = operand(choice, 0), operand(choice, 1)
    if choice.op_type == "GatherND":
        column = node_of(plain(ids), "Unsqueeze")
        axes = integers(column.inputs[1]) if column is not None else None
        if column is None or rank(ids) is None or axes not in ([-1], [len(ids.shape or ()) - 1]):
            raise Mismatch(choice, "one token id per token", f"{ids.name} {ids.shape}")
        ids = operand(column, 0)
        if attribute(choice, "batch_dims", 0) != 0:
            raise Mismatch(choice, "one table for all rows", f"batch_dims {attribute(choice, 'batch_dims')}")
    elif attribute(choice, "axis", 0) != 0:
        raise Mismatch(choice, "a row of the table for every token", f"axis {attribute(choice, 'axis')}")
    tokens, given = (
        [dim(v, i) for i in range(count)] for v, count in ((logits, len(logits.shape or ()) - 1), (ids, rank(ids) or 0))
    )
    if rank(table) != 2 or tokens != given or {table.dtype, dtype_of(ids)} != {ir.DataType.INT64}:
        found = f"{table.dtype}{table.shape} and {ids.dtype}{ids.shape}"
        raise Mismatch(choice, "an int64 table [V, K] and an int64 id for every token", found)
    return [ids, table]
