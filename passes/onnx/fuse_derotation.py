"""``fuse-derotation``: an attention whose outputs are rotated back becomes one op that gives them rotated back."""

from __future__ import annotations

import onnx_ir as ir

from v4c.custom_ops import DOMAIN, OPS
from v4c.custom_ops.csa_attention import CSA_ATTENTION
from v4c.custom_ops.derotated_attention import DEROTATED_CSA, DEROTATED_HCA, DEROTATED_SLIDING_ATTENTION
from v4c.custom_ops.hca_attention import HCA_ATTENTION
from v4c.custom_ops.sliding_attention import SLIDING_ATTENTION
from v4c.custom_ops.trailing_rope import TRAILING_ROPE

from .matching import Fusion, Mismatch, WalkPass, attribute, new_node, operand

DEROTATED = {
    CSA_ATTENTION.name: DEROTATED_CSA.name,
    HCA_ATTENTION.name: DEROTATED_HCA.name,
    SLIDING_ATTENTION.name: DEROTATED_SLIDING_ATTENTION.name,
}
"""Each attention op, and the op that also rotates its outputs back."""


class FuseDerotation(WalkPass):
    """``TrailingRope(out, positions, inv_freq; sign=-1)`` of an attention's ``out`` -> its `Derotated` form.

    The rotation is by the attention's own positions, and alone reads ``out``.

    It stands before import, where kernels are chosen: the outputs are turned before they leave the cache, and a launch
    and a pass over them are saved.
    """

    pass_name = "fuse-derotation"
    anchors = frozenset((TRAILING_ROPE.name,))

    def find(self, node: ir.Node) -> Fusion | None:
        """The attention whose outputs the `TrailingRope` `node` turns."""
        out, positions, inv_freq = (operand(node, i) for i in range(3))
        attention = out.producer()
        if attention is None or attention.domain != DOMAIN or attention.op_type not in DEROTATED:
            return None
        if out is not attention.outputs[0]:
            return None
        sign = attribute(node, "sign")
        if sign != -1:
            raise Mismatch(node, "a rotation back", f"sign {sign}")
        own = operand(attention, OPS[attention.op_type].inputs.index("positions"))
        if positions is not own:
            raise Mismatch(node, f"the attention's positions {own.name}", positions.name)
        fused = new_node(
            DEROTATED[attention.op_type],
            [*(operand(attention, i) for i in range(len(attention.inputs))), inv_freq],
            {name: a.value for name, a in attention.attributes.items()},
            domain=DOMAIN,
            outputs=2,
        )
        return Fusion([fused], dict(zip((node.outputs[0], attention.outputs[1]), fused.outputs, strict=True)))
