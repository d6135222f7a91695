"""``fuse-mhc-norm``: the hyper-connections' entry of a sublayer and the norm behind it become one `MHCPreNorm`."""

from __future__ import annotations

import onnx_ir as ir

from v4c.custom_ops import DOMAIN
from v4c.custom_ops.mhc_pre import MHC_PRE
from v4c.custom_ops.mhc_pre_norm import MHC_PRE_NORM

from .matching import Fusion, Mismatch, WalkPass, attribute, new_node, operand


class FuseMHCNorm(WalkPass):
    """Before -> after::

        collapsed, post, comb = MHCPre(streams, fn, base, scale)
        y = RMSNormalization(collapsed, norm)

        y, post, comb = MHCPreNorm(streams, fn, base, scale, norm)

    The norm is over the last axis with a weight per column, and nothing else reads `collapsed`.

    It stands before import, where kernels are chosen: the norm then needs no launch, and reads its row while it is in
    the cache. It stands before `fuse-norm-projection`, which would take the norm for the product behind it.
    """

    pass_name = "fuse-mhc-norm"
    anchors = frozenset(("RMSNormalization",))

    def find(self, node: ir.Node) -> Fusion | None:
        """The entry whose collapsed streams are what the norm `node` reads."""
        collapsed, norm = operand(node, 0), operand(node, 1)
        entry = collapsed.producer()
        if entry is None or not is_op(entry, MHC_PRE.name, node.graph) or collapsed is not entry.outputs[0]:
            return None
        axis = attribute(node, "axis", -1)
        if axis != -1:
            raise Mismatch(node, "a norm over the last axis", f"axis {axis}")
        if norm.shape is None or len(norm.shape) != 1 or norm.shape[0] == 1:
            shape = "unknown shape" if norm.shape is None else f"shape {norm.shape}"
            raise Mismatch(node, "a weight per column", f"{norm.name} of {shape}")
        check_joinable(entry, node)
        fused = new_node(
            MHC_PRE_NORM.name,
            [*(operand(entry, i) for i in range(4)), norm],
            {n: attribute(entry, n) for n in MHC_PRE.attributes} | {"eps": attribute(node, "epsilon", 1e-5)},
            domain=DOMAIN,
            outputs=3,
        )
        return Fusion([fused], dict(zip((node.outputs[0], *entry.outputs[1:]), fused.outputs, strict=True)))


def is_op(node: ir.Node, name: str, graph: ir.Graph | None) -> bool:
    """Whether `node` is the custom op `name`, in `graph` itself and not in one around it."""
    return (node.domain, node.op_type) == (DOMAIN, name) and node.graph is graph


def check_joinable(first: ir.Node, last: ir.Node) -> None:
    """Whether `first` and `last`, whose input 0 it gives, can be one node.

    Raises:
        Mismatch: `last` also waits for something that is computed from what `first` gives.
    """
    for index in range(1, len(last.inputs)):
        weight = operand(last, index)
        pending, seen = [weight.producer()], set()
        while pending:
            node = pending.pop()
            if node is first:
                raise Mismatch(last, "weights that do not depend on the streams", f"{weight.name}, which does")
            if node is not None and node not in seen:
                seen.add(node)
                pending.extend(v.producer() for v in node.inputs if v is not None)
