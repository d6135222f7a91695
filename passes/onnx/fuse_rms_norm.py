"""``fuse-rms-norm``: an RMS norm spelled in elementwise operators becomes one `RMSNormalization` of opset 23."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .matching import (
    Fusion,
    Mismatch,
    WalkPass,
    array,
    attribute,
    dim,
    dtype_of,
    new_constant,
    new_node,
    node_of,
    operand,
    operands,
    plain,
    rank,
    scalar,
)


class FuseRMSNorm(WalkPass):
    """``x * rsqrt(mean(x ** 2, axis=-1) + eps) [* weight]`` -> ``RMSNormalization(x, weight or ones)``.

    Accepted: the square as ``Pow(x, 2)`` or ``Mul(x, x)``; ``rsqrt`` as ``Reciprocal(Sqrt(v))``, ``Div(1, Sqrt(v))`` or
    ``Pow(v, -0.5)``, or ``Div(x, Sqrt(v))``; operands in either order; a weight ``[D]`` that alone reads the result.
    Arithmetic is float32; Casts to and from it stay around the norm. A factor that is not a weight stays a Mul.

    It stands before everything that looks for a norm.
    """

    pass_name = "fuse-rms-norm"
    anchors = frozenset(("Mul", "Div"))

    def find(self, node: ir.Node) -> Fusion | None:
        """The norm whose last step, before the weight, is `node`."""
        for x, mean_square in _normalised(node):
            found = _epsilon(mean_square, x)
            if found is not None:
                mean, epsilon = found
                width = _checked_width(x, mean)
                return self._fusion(node, x, width, epsilon)
        return None

    def _fusion(self, node: ir.Node, x: ir.Value, width: int, epsilon: float) -> Fusion:
        result, nodes = node.outputs[0], []
        product, weight = _scaled(result)
        if product is not None and list(weight.shape or ()) == [width]:
            result = product.outputs[0]
        else:
            if product is not None and (weight.producer() is None or array(weight) is not None):
                shape = "of unknown shape" if weight.shape is None else list(weight.shape)
                self.refusals.append(str(Mismatch(product, f"a weight [{width}]", f"{shape}: the norm is fused alone")))
            ones = new_constant(np.ones(width, np.float32))
            weight = ones.outputs[0]
            nodes.append(ones)
        attributes = {"axis": -1, "epsilon": epsilon, "stash_type": 1}
        nodes.append(new_node("RMSNormalization", [x, weight], attributes))
        return Fusion(nodes, {result: nodes[-1].outputs[0]})


def _normalised(node: ir.Node) -> list[tuple[ir.Value, ir.Value]]:
    """Pairs (x, v) with which `node` could be ``x / sqrt(v)``."""
    if node.op_type == "Div":
        root = node_of(plain(operand(node, 1)), "Sqrt")
        return [(plain(operand(node, 0)), operand(root, 0))] if root is not None else []
    pairs = []
    for x, factor in operands(node):
        step = node_of(plain(factor), "Reciprocal", "Div", "Pow")
        if step is None:
            continue
        if step.op_type == "Pow":
            if scalar(step.inputs[1]) == -0.5:
                pairs.append((plain(x), operand(step, 0)))
            continue
        if step.op_type == "Div" and scalar(step.inputs[0]) != 1.0:
            continue
        root = node_of(plain(operand(step, len(step.inputs) - 1)), "Sqrt")
        if root is not None:
            pairs.append((plain(x), operand(root, 0)))
    return pairs


def _epsilon(value: ir.Value, x: ir.Value) -> tuple[ir.Node, float] | None:
    """The mean and the epsilon of ``mean(x ** 2) + eps``; Mismatch where the epsilon is not constant."""
    add = node_of(plain(value), "Add")
    if add is None:
        return None
    for term, other in operands(add):
        mean = node_of(plain(term), "ReduceMean")
        square = node_of(plain(operand(mean, 0)), "Pow", "Mul") if mean is not None else None
        if mean is None or square is None or plain(operand(square, 0)) is not x:
            continue
        if square.op_type == "Pow" and scalar(square.inputs[1]) != 2.0:
            continue
        if square.op_type == "Mul" and plain(operand(square, 1)) is not x:
            continue
        epsilon = scalar(other)
        if epsilon is None:
            raise Mismatch(add, "a constant epsilon", f"{other.name}, a value of run time")
        return mean, epsilon
    return None


def _checked_width(x: ir.Value, mean: ir.Node) -> int:
    """The size of the one axis the mean is taken over; Mismatch where it is not the last, kept, and of known size."""
    count = rank(x)
    if count is None:
        raise Mismatch(mean, f"a known shape of {x.name}", "none")
    axes = array(mean.inputs[1]) if len(mean.inputs) > 1 else None
    if axes is None or [int(a) % count for a in axes.reshape(-1)] != [count - 1]:
        found = "all axes" if axes is None else f"axes {axes.tolist()} of {count}"
        raise Mismatch(mean, "a mean over the last axis", found)
    if attribute(mean, "keepdims", 1) != 1:
        raise Mismatch(mean, "a mean that keeps its axis", "keepdims 0")
    if dtype_of(x) != ir.DataType.FLOAT:
        raise Mismatch(mean, "float32 arithmetic", dtype_of(x))
    width = dim(x, -1)
    if not isinstance(width, int):
        raise Mismatch(mean, "a known width", width)
    return width


def _scaled(value: ir.Value) -> tuple[ir.Node | None, ir.Value]:
    """The product that alone reads `value`, and its other factor; (None, value) where there is none."""
    uses = list(value.uses())
    node = uses[0].node if len(uses) == 1 and not value.is_graph_output() else None
    source = value.producer()
    if node is None or source is None or node.graph is not source.graph or node_of(node.outputs[0], "Mul") is None:
        return None, value
    return node, operand(node, 1 - uses[0].idx)
