"""``fuse-rope``: rotary embedding of the trailing dims, spelled in elementwise operators, becomes `TrailingRope`."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from v4c.custom_ops import DOMAIN

from .arrangement import labels
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
    plain,
    rank,
)
from .rope_rotation import Rotation
from .rope_tables import PAIR, ROW, TOKEN, Table, made_of_angles, same_angles

_SUMS = ("Add", "Sub")


class FuseRope(WalkPass):
    """``Concat(kept dims of x, rotated pairs (2i, 2i + 1) of the rest)`` -> ``TrailingRope(x, positions, inv_freq)``.

    Accepted: pairs rotated one half at a time and stacked (our own function body), or as ``x * cos + rotate(x) * sin``
    with every angle written twice in a row (Hugging Face), in any order of operands. x is ``[B, S, H, C]``,
    ``[B, H, S, C]`` (transposed around the op) or ``[B, S, C]``; cosines and sines are of ``(start[B] + arange(S)) *
    inv_freq`` and may be read by several rotations; a negated sine is sign -1.

    Refused: halves instead of pairs, scaled tables, positions that are not ``start + arange``, other dims than the
    trailing ones. It stands after `fuse-rms-norm`, and before whatever looks for `TrailingRope`.
    """

    pass_name = "fuse-rope"
    anchors = frozenset(("Concat",))

    def find(self, node: ir.Node) -> Fusion | None:
        """The rotation whose Concat with the kept dims is `node`."""
        if len(node.inputs) != 2:
            return None
        kept, rotated = plain(operand(node, 0)), plain(operand(node, 1))
        cut = node_of(kept, "Slice", "Split")
        if cut is None:
            if node_of(rotated, "Slice", "Split") is not None and made_of_angles(kept, _SUMS):
                raise Mismatch(node, "the trailing dims rotated", "the leading ones")
            return None
        if not made_of_angles(rotated, _SUMS):
            return None
        x = plain(operand(cut, 0))
        count = rank(x)
        width = dim(x, -1) if count is not None else None
        if count not in (3, 4) or not isinstance(width, int) or dtype_of(x) != ir.DataType.FLOAT:
            raise Mismatch(node, "float32 [B, S, H, C] or [B, S, C], C known", f"{x.name} {x.dtype}{x.shape}")
        if attribute(node, "axis") not in (-1, count - 1):
            raise Mismatch(node, "the last dims rotated", f"axis {attribute(node, 'axis')}")
        rotation = Rotation(x, width)
        sign = _sign(node, rotation, kept, rotated)
        assert rotation.cos is not None
        return self._fusion(node, rotation, rotation.cos, sign)

    def _fusion(self, node: ir.Node, rotation: Rotation, table: Table, sign: float) -> Fusion:
        x, start, speeds = rotation.x, table.start, table.speeds
        assert start is not None
        assert speeds is not None
        layout, tokens = _layout(node, table, len(x.shape or ()))
        # A size of one would be broadcast by the spelling, and not by the op.
        wanted, given = [dim(x, 0), dim(x, tokens)], [dim(start, 0), table.count]
        if wanted != given:
            raise Mismatch(node, f"positions for every row and token, {wanted}", given)
        nodes = []
        if rank(speeds) != 1:
            found = array(speeds)
            assert found is not None
            nodes.append(new_constant(found.reshape(-1)))
            speeds = nodes[-1].outputs[0]

        def rope(inner: ir.Value) -> ir.Node:
            inputs = [inner, start, speeds]
            return new_node("TrailingRope", inputs, {"sign": sign}, domain=DOMAIN, shape=inner.shape)

        dims = list(x.shape or ())
        if layout == "heads last":
            nodes.append(rope(x))
        elif layout == "no heads":
            axis = new_constant(np.array([2], np.int64))
            before = new_node("Unsqueeze", [x, axis.outputs[0]], shape=[*dims[:2], 1, dims[2]])
            rotated = rope(before.outputs[0])
            nodes += [axis, before, rotated, new_node("Squeeze", [rotated.outputs[0], axis.outputs[0]])]
        else:
            swap = {"perm": [0, 2, 1, 3]}
            source = node_of(x, "Transpose")
            if source is None or list(attribute(source, "perm", ())) != swap["perm"]:
                source = new_node("Transpose", [x], swap, shape=[dims[0], dims[2], dims[1], dims[3]])
                nodes.append(source)
                rotated = rope(source.outputs[0])
            else:
                rotated = rope(operand(source, 0))
            nodes += [rotated, new_node("Transpose", [rotated.outputs[0]], swap)]
        return Fusion(nodes, {node.outputs[0]: nodes[-1].outputs[0]}, [x, *rotation.shared])


def _sign(node: ir.Node, rotation: Rotation, kept: ir.Value, rotated: ir.Value) -> float:
    """1 or -1 if the trailing pairs are rotated forward or back and the rest is kept; Mismatch otherwise."""
    even, odd = rotation.halves(rotated)
    cos, sin, width = rotation.cos, rotation.sin, rotation.width
    if cos is None or sin is None or not same_angles(cos, sin):
        raise Mismatch(node, "a cosine and a sine of the same angles", "other tables")
    if cos.scale != 1 or abs(sin.scale) != 1:
        raise Mismatch(node, "cosines and sines of amplitude 1", f"{cos.scale} and {sin.scale}")
    pairs = max(len(dims) for dims, _ in even)
    first = width - 2 * pairs
    evens, odds = tuple(range(first, width, 2)), tuple(range(first + 1, width, 2))
    if (angles := cos.axes[-1][0].size) != pairs:
        raise Mismatch(node, f"an angle for each of {pairs} pairs", angles)
    left = rotation.columns(kept)
    if left is None or left.tolist() != list(range(first)):
        raise Mismatch(node, f"dims 0 ... {first} of {rotation.x.name} kept", "others")
    for sign in (1.0, -1.0):
        if even == {(evens, "cos"): 1.0, (odds, "sin"): -sign} and odd == {(odds, "cos"): 1.0, (evens, "sin"): sign}:
            return sign * sin.scale
    if tuple(range(first, first + pairs)) in {dims for dims, _ in even}:
        raise Mismatch(node, "interleaved pairs (2i, 2i + 1)", f"pairs (i, i + {pairs}), a half-split rotation")
    raise Mismatch(node, "a rotation of every pair by its angle", "another sum of products")


def _layout(node: ir.Node, table: Table, count: int) -> tuple[str, int]:
    """Where the tables expect heads and tokens, and the axis of the tokens."""
    lead = labels(table.axes)[:-1]
    lead = ((),) * (count - 1 - len(lead)) + lead
    layouts = {
        ((ROW,), (TOKEN,), ()): ("heads last", 1),
        ((ROW,), (), (TOKEN,)): ("heads first", 2),
        ((ROW,), (TOKEN,)): ("no heads", 1),
    }
    if lead not in layouts or labels(table.axes)[-1][:1] != (PAIR,):
        raise Mismatch(node, "an angle for every row, token and pair", f"tables over {labels(table.axes)}")
    return layouts[lead]
