"""Which elements of a value's last axis another value holds, cut out of it by Slice, Split, Gather and Reshape."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .matching import array, attribute, dim, integers, node_of, operand, plain, rank, sizes


def columns(value: ir.Value, source: ir.Value, width: int) -> np.ndarray | None:
    """The index in the last axis of `source`, of that size, of every trailing element of `value`.

    Returns:
        ``[n]``, or ``[n, m]`` where the axis was reshaped into two, and so on; None if `value` is not cut out of
        `source`, or is in other axes too.
    """
    value = plain(value)
    if value is source:
        return np.arange(width)
    node = node_of(value, "Slice", "Split", "Gather", "Reshape", "Squeeze")
    inner = columns(operand(node, 0), source, width) if node is not None else None
    if node is None or inner is None:
        return None
    if node.op_type == "Reshape":
        return _reshaped(node, inner)
    return _cut(node, value, inner)


def _cut(node: ir.Node, value: ir.Value, inner: np.ndarray) -> np.ndarray | None:
    """What one operator over the last axis leaves of `inner`."""
    count = rank(operand(node, 0))
    last = (-1, None if count is None else count - 1)
    if node.op_type == "Slice":
        limits = [integers(v) for v in node.inputs[1:]]
        if len(limits) < 3 or any(v is None or len(v) != 1 for v in limits):
            return None
        (start,), (end,), (axis,), *step = (v for v in limits if v is not None)
        return inner[..., slice(start, end, *(step[0] if step else ()))] if axis in last else None
    if node.op_type == "Squeeze":
        axes = integers(node.inputs[1]) if len(node.inputs) > 1 else None
        return inner[..., 0] if axes is not None and len(axes) == 1 and axes[0] in last else None
    if attribute(node, "axis", 0) not in last:
        return None
    if node.op_type == "Gather":
        index = array(node.inputs[1])
        return inner[..., index] if index is not None else None
    place = value.index()
    assert place is not None
    parts = integers(node.inputs[1]) if len(node.inputs) > 1 else None
    if parts is None:
        parts = [-(-inner.shape[-1] // len(node.outputs))] * len(node.outputs)
    first = sum(parts[:place])
    return inner[..., first : first + parts[place]]


def _reshaped(node: ir.Node, inner: np.ndarray) -> np.ndarray | None:
    """``[..., n] -> [..., m, n / m]``: only the axes that hold `inner` may change."""
    source, target = operand(node, 0), sizes(node.inputs[1])
    count = rank(source)
    if count is None or target is None:
        return None
    lead = count - inner.ndim
    tail = [d for d in target[lead:] if isinstance(d, int)]
    kept = all(d in (0, dim(source, i)) for i, d in enumerate(target[:lead]))
    if not kept or 0 in tail or len(tail) != len(target) - lead or tail.count(-1) > 1:
        return None
    known = np.prod([d for d in tail if d != -1], dtype=int)
    return inner.reshape(tail) if known == inner.size or (-1 in tail and inner.size % known == 0) else None
