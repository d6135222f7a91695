"""Entry of a sublayer up to its projections: hyper-connections collapse the streams, and an RMS norm follows.

The pass `fuse-mhc-norm` puts this op in the place of `MHCPre` and the norm that reads it.
"""

from __future__ import annotations

from collections.abc import Sequence

from onnxscript import opset23 as op
from onnxscript import script
from onnxscript.onnx_types import FLOAT
from onnxscript.values import Opset
from torch import Tensor
from torch.nn import functional

from .base import DOMAIN, OPSET_VERSION, Attributes, TensorSpec, define
from .mhc_pre import MHC_PRE, MHCPre, mhc_pre

v4c = Opset(DOMAIN, OPSET_VERSION)


def mhc_pre_norm(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm: Tensor,
    iterations: int,
    hc_eps: float,
    norm_eps: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`mhc_pre`, then a weighted RMS norm of the collapsed streams (mHC paper, section 4.2).

    Args:
        streams: ``[B, S, M, D]`` float32.
        fn: ``[(2 + M) * M, M * D]`` float32; its rows give the logits of pre (M), post (M) and comb (M * M).
        base: ``[(2 + M) * M]`` float32, added to the scaled logits.
        scale: ``[3]`` float32, of the pre, post and comb logits.
        norm: ``[D]`` float32, weight of the norm of the collapsed streams.
        iterations: Sinkhorn-Knopp iterations; the first normalises columns only, as a softmax has done the rows.
        hc_eps: added to the pre weights, to the softmax and to every Sinkhorn divisor.
        norm_eps: of the RMS norm over all streams of a token, before `fn`.
        eps: of the RMS norm of the collapsed streams.

    Returns:
        y ``[B, S, D]``, post ``[B, S, M]`` and comb ``[B, S, M, M]``, float32.
    """
    collapsed, post, comb = mhc_pre(streams, fn, base, scale, iterations, hc_eps, norm_eps)
    return functional.rms_norm(collapsed, norm.shape, norm, eps), post, comb


def _shapes(inputs: Sequence[TensorSpec], attributes: Attributes) -> tuple[TensorSpec, ...]:
    return MHC_PRE.shape_rule(inputs, attributes)


@script(v4c, default_opset=op)
def MHCPreNorm(
    streams: FLOAT[...],
    fn: FLOAT[...],
    base: FLOAT[...],
    scale: FLOAT[...],
    norm: FLOAT[...],
    iterations: int,
    hc_eps: float,
    norm_eps: float,
    eps: float,
) -> tuple[FLOAT[...], FLOAT[...], FLOAT[...]]:
    collapsed, post, comb = MHCPre(streams, fn, base, scale, iterations=iterations, hc_eps=hc_eps, norm_eps=norm_eps)
    return op.RMSNormalization(collapsed, norm, axis=-1, epsilon=eps), post, comb


MHC_PRE_NORM = define(
    "MHCPreNorm",
    mhc_pre_norm,
    inputs=("streams", "fn", "base", "scale", "norm"),
    outputs=("y", "post", "comb"),
    attributes={"iterations": int, "hc_eps": float, "norm_eps": float, "eps": float},
    shape_rule=_shapes,
    functions=(MHCPreNorm, *MHC_PRE.functions),
)
