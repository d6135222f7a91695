"""``fuse-mhc-post-pre``: the hyper-connections between two sublayers become one `MHCPostPreNorm`."""

from __future__ import annotations

import onnx_ir as ir

from v4c.custom_ops import DOMAIN
from v4c.custom_ops.mhc_post import MHC_POST
from v4c.custom_ops.mhc_post_pre_norm import MHC_POST_PRE_NORM
from v4c.custom_ops.mhc_pre_norm import MHC_PRE_NORM

from .fuse_mhc_norm import check_joinable, is_op
from .matching import Fusion, WalkPass, attribute, new_node, operand


class FuseMHCPostPre(WalkPass):
    """Before -> after::

        mixed = MHCPost(x, streams, post, comb)
        y, next_post, next_comb = MHCPreNorm(mixed, fn, base, scale, norm)

        mixed, y, next_post, next_comb = MHCPostPreNorm(x, streams, post, comb, fn, base, scale, norm)

    Others may read `mixed` too, as the exit of the next sublayer does.

    It stands after `fuse-mhc-norm`, which makes the second operator. The streams are then multiplied with `fn` while
    they are in the cache, and a decode step launches threads once instead of twice.
    """

    pass_name = "fuse-mhc-post-pre"
    anchors = frozenset((MHC_PRE_NORM.name,))

    def find(self, node: ir.Node) -> Fusion | None:
        """The exit whose mixed streams are what the entry `node` reads."""
        mixed = operand(node, 0)
        leaving = mixed.producer()
        if leaving is None or not is_op(leaving, MHC_POST.name, node.graph):
            return None
        check_joinable(leaving, node)
        fused = new_node(
            MHC_POST_PRE_NORM.name,
            [*(operand(leaving, i) for i in range(4)), *(operand(node, i) for i in range(1, 5))],
            {n: attribute(node, n) for n in MHC_PRE_NORM.attributes},
            domain=DOMAIN,
            outputs=4,
        )
        return Fusion([fused], dict(zip((mixed, *node.outputs), fused.outputs, strict=True)))
