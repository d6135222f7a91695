"""From one sublayer's output to the next one's projections: hyper-connections' exit, entry, and an RMS norm.

The pass `fuse-mhc-post-pre` puts this op in the place of `MHCPost` and the `MHCPreNorm` that reads it.
"""

from __future__ import annotations

from collections.abc import Sequence

from onnxscript import opset23 as op
from onnxscript import script
from onnxscript.onnx_types import FLOAT
from onnxscript.values import Opset
from torch import Tensor

from .base import DOMAIN, OPSET_VERSION, Attributes, TensorSpec, define
from .mhc_post import MHC_POST, MHCPost, mhc_post
from .mhc_pre_norm import MHC_PRE_NORM, MHCPreNorm, mhc_pre_norm

v4c = Opset(DOMAIN, OPSET_VERSION)


def mhc_post_pre_norm(
    x: Tensor,
    streams: Tensor,
    post: Tensor,
    comb: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm: Tensor,
    iterations: int,
    hc_eps: float,
    norm_eps: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`mhc_post` of one sublayer, then `mhc_pre_norm` of the next on the mixed streams (mHC paper, section 4.2).

    Args:
        x: ``[B, S, D]`` float32, the sublayer's output.
        streams: ``[B, S, M, D]`` float32, as they entered the sublayer.
        post: ``[B, S, M]`` float32, of the sublayer that ends.
        comb: ``[B, S, M, M]`` float32, of the sublayer that ends; its first index is the old stream.
        fn: ``[(2 + M) * M, M * D]`` float32, like all that follows of the sublayer that begins.
        base: ``[(2 + M) * M]`` float32.
        scale: ``[3]`` float32.
        norm: ``[D]`` float32, weight of the norm of the collapsed streams.
        iterations: Sinkhorn-Knopp iterations.
        hc_eps: added to the pre weights, to the softmax and to every Sinkhorn divisor.
        norm_eps: of the RMS norm over all streams of a token, before `fn`.
        eps: of the RMS norm of the collapsed streams.

    Returns:
        mixed ``[B, S, M, D]``, the streams that enter the next sublayer; y ``[B, S, D]``, its input; next_post
        ``[B, S, M]`` and next_comb ``[B, S, M, M]``; all float32.
    """
    mixed = mhc_post(x, streams, post, comb)
    return mixed, *mhc_pre_norm(mixed, fn, base, scale, norm, iterations, hc_eps, norm_eps, eps)


def _shapes(inputs: Sequence[TensorSpec], attributes: Attributes) -> tuple[TensorSpec, ...]:
    (mixed,) = MHC_POST.shape_rule(inputs[:4], {})
    return mixed, *MHC_PRE_NORM.shape_rule([mixed, *inputs[4:]], attributes)


@script(v4c, default_opset=op)
def MHCPostPreNorm(
    x: FLOAT[...],
    streams: FLOAT[...],
    post: FLOAT[...],
    comb: FLOAT[...],
    fn: FLOAT[...],
    base: FLOAT[...],
    scale: FLOAT[...],
    norm: FLOAT[...],
    iterations: int,
    hc_eps: float,
    norm_eps: float,
    eps: float,
) -> tuple[FLOAT[...], FLOAT[...], FLOAT[...], FLOAT[...]]:
    mixed = MHCPost(x, streams, post, comb)
    y, next_post, next_comb = MHCPreNorm(
        mixed, fn, base, scale, norm, iterations=iterations, hc_eps=hc_eps, norm_eps=norm_eps, eps=eps
    )
    return mixed, y, next_post, next_comb


MHC_POST_PRE_NORM = define(
    "MHCPostPreNorm",
    mhc_post_pre_norm,
    inputs=("x", "streams", "post", "comb", "fn", "base", "scale", "norm"),
    outputs=("mixed", "y", "next_post", "next_comb"),
    attributes={"iterations": int, "hc_eps": float, "norm_eps": float, "eps": float},
    shape_rule=_shapes,
    functions=(MHCPostPreNorm, *MHC_POST.functions, *MHC_PRE_NORM.functions),
)
