"""``fuse-rotary-query-kv``: the norms and rotations of an attention's queries and rows become one `RotaryQueryKV`."""

from __future__ import annotations

import onnx_ir as ir

from v4c.custom_ops import DOMAIN
from v4c.custom_ops.rotary_query_kv import ROTARY_QUERY_KV
from v4c.custom_ops.trailing_rope import TRAILING_ROPE

from .fuse_derotation import DEROTATED
from .matching import Fusion, Mismatch, WalkPass, array, attribute, new_node, operand


class FuseRotaryQueryKV(WalkPass):
    """What one attention op reads as `q` and `kv`, before -> after::

        q  = TrailingRope(RMSNormalization(heads, ones), positions, inv_freq)
        kv = Squeeze(TrailingRope(Unsqueeze(RMSNormalization(row, weight), 2), positions, inv_freq), 2)

        q, kv = RotaryQueryKV(heads, row, weight, positions, inv_freq)

    Both rotations are forward, and each norm is over the last axis with an epsilon of its own.

    It stands before import, where kernels are chosen: four launches become one, a row is rotated while it is in the
    cache, and the angles of a token are computed once.
    """

    pass_name = "fuse-rotary-query-kv"
    anchors = frozenset((*DEROTATED, *DEROTATED.values()))

    def find(self, node: ir.Node) -> Fusion | None:
        """The two chains that end in the attention op `node`."""
        q, kv = operand(node, 0), operand(node, 1)
        q_chain = _chain(q, "TrailingRope", "RMSNormalization")
        kv_chain = _chain(kv, "Squeeze", "TrailingRope", "Unsqueeze", "RMSNormalization")
        if q_chain is None or kv_chain is None:
            return None
        q_rope, q_norm = q_chain
        squeeze, kv_rope, unsqueeze, kv_norm = kv_chain
        for rope in (q_rope, kv_rope):
            sign = attribute(rope, "sign")
            if sign != 1:
                raise Mismatch(rope, "a forward rotation", f"sign {sign}")
        for index, name in enumerate(TRAILING_ROPE.inputs[1:], start=1):
            if q_rope.inputs[index] is not kv_rope.inputs[index]:
                names = " and ".join(operand(r, index).name or "" for r in (q_rope, kv_rope))
                raise Mismatch(node, f"q and kv rotated with the same {name}", names)
        for axis_of in (squeeze, unsqueeze):
            axes = array(axis_of.inputs[1]) if len(axis_of.inputs) > 1 else None
            if axes is None or axes.reshape(-1).tolist() not in ([2], [-2]):
                raise Mismatch(axis_of, "axis 2, the heads", "other axes" if axes is None else axes.tolist())
        for norm, last in ((q_norm, 3), (kv_norm, 2)):
            if attribute(norm, "axis", -1) not in (-1, last):
                raise Mismatch(norm, "a norm over the last axis", f"axis {attribute(norm, 'axis')}")
        weight = array(q_norm.inputs[1])
        if weight is None or not (weight == 1).all():
            raise Mismatch(q_norm, "a norm of q without a weight", f"weight {operand(q_norm, 1).name}")
        fused = new_node(
            ROTARY_QUERY_KV.name,
            [operand(q_norm, 0), operand(kv_norm, 0), operand(kv_norm, 1), operand(q_rope, 1), operand(q_rope, 2)],
            {"q_eps": _epsilon(q_norm), "kv_eps": _epsilon(kv_norm)},
            domain=DOMAIN,
            outputs=2,
        )
        return Fusion([fused], dict(zip((q, kv), fused.outputs, strict=True)))


def _chain(value: ir.Value, *op_types: str) -> list[ir.Node] | None:
    """The nodes that made `value`, last first, each the producer of the next one's first input; None for others."""
    nodes: list[ir.Node] = []
    for op_type in op_types:
        node = (operand(nodes[-1], 0) if nodes else value).producer()
        if node is None or node.op_type != op_type or node.domain not in ("", DOMAIN):
            return None
        nodes.append(node)
    return nodes


def _epsilon(norm: ir.Node) -> float:
    """A norm's epsilon; ONNX's default where it has none."""
    return float(attribute(norm, "epsilon", 1e-5))
