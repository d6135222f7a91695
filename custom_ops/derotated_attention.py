"""The three attentions with their outputs rotated back by the query's position: what the output projection takes.

A key row is also the value row, so the weighted sums carry the rotation of their keys; turning them back by the query's
position leaves the relative one. The pass `fuse-derotation` puts these ops in the place of an attention and its
`TrailingRope`, so that a target turns the outputs while it still holds them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnxscript
from onnxscript import INT64, script
from onnxscript import opset23 as op
from onnxscript.onnx_types import FLOAT
from torch import Tensor

from .base import CustomOp, define
from .csa_attention import CSA_ATTENTION, CompressedSparseAttention, csa_attention
from .hca_attention import HCA_ATTENTION, HeavilyCompressedAttention, hca_attention
from .onnx_common import v4c
from .sliding_attention import SLIDING_ATTENTION, SlidingWindowAttention, sliding_attention
from .trailing_rope import TRAILING_ROPE, TrailingRope, trailing_rope


def derotated_csa(
    q: Tensor,
    kv: Tensor,
    window: Tensor,
    rows: Tensor,
    indices: Tensor,
    sinks: Tensor,
    positions: Tensor,
    lengths: Tensor,
    inv_freq: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`CompressedSparseAttention`, its outputs rotated back (DeepSeek-V4 paper, section 2.3).

    Args:
        q, kv, window, rows, indices, sinks, positions, lengths, scale: as in `csa_attention`.
        inv_freq: ``[R / 2]`` float32; R trailing dims are rotated.

    Returns:
        ``[B, S, H, C]`` float32 and the updated window.
    """
    out, window = csa_attention(q, kv, window, rows, indices, sinks, positions, lengths, scale)
    return trailing_rope(out, positions, inv_freq, -1.0), window


def derotated_hca(
    q: Tensor,
    kv: Tensor,
    window: Tensor,
    rows: Tensor,
    sinks: Tensor,
    positions: Tensor,
    lengths: Tensor,
    inv_freq: Tensor,
    ratio: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`HeavilyCompressedAttention`, its outputs rotated back (DeepSeek-V4 paper, section 2.3).

    Args:
        q, kv, window, rows, sinks, positions, lengths, ratio, scale: as in `hca_attention`.
        inv_freq: ``[R / 2]`` float32; R trailing dims are rotated.

    Returns:
        ``[B, S, H, C]`` float32 and the updated window.
    """
    out, window = hca_attention(q, kv, window, rows, sinks, positions, lengths, ratio, scale)
    return trailing_rope(out, positions, inv_freq, -1.0), window


def derotated_sliding_attention(
    q: Tensor,
    kv: Tensor,
    window: Tensor,
    sinks: Tensor,
    positions: Tensor,
    lengths: Tensor,
    inv_freq: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`SlidingWindowAttention`, its outputs rotated back (DeepSeek-V4 paper, section 2.3).

    Args:
        q, kv, window, sinks, positions, lengths, scale: as in `sliding_attention`.
        inv_freq: ``[R / 2]`` float32; R trailing dims are rotated.

    Returns:
        ``[B, S, H, C]`` float32 and the updated window.
    """
    out, window = sliding_attention(q, kv, window, sinks, positions, lengths, scale)
    return trailing_rope(out, positions, inv_freq, -1.0), window


@script(v4c, default_opset=op)
def DerotatedCSA(
    q: FLOAT[...],
    kv: FLOAT[...],
    window: FLOAT[...],
    rows: FLOAT[...],
    indices: INT64[...],
    sinks: FLOAT[...],
    positions: INT64[...],
    lengths: INT64[...],
    inv_freq: FLOAT[...],
    scale: float,
) -> tuple[FLOAT[...], FLOAT[...]]:
    out, window_out = CompressedSparseAttention(q, kv, window, rows, indices, sinks, positions, lengths, scale=scale)
    return TrailingRope(out, positions, inv_freq, sign=-1.0), window_out


@script(v4c, default_opset=op)
def DerotatedHCA(
    q: FLOAT[...],
    kv: FLOAT[...],
    window: FLOAT[...],
    rows: FLOAT[...],
    sinks: FLOAT[...],
    positions: INT64[...],
    lengths: INT64[...],
    inv_freq: FLOAT[...],
    ratio: int,
    scale: float,
) -> tuple[FLOAT[...], FLOAT[...]]:
    out, window_out = HeavilyCompressedAttention(
        q, kv, window, rows, sinks, positions, lengths, ratio=ratio, scale=scale
    )
    return TrailingRope(out, positions, inv_freq, sign=-1.0), window_out


@script(v4c, default_opset=op)
def DerotatedSlidingAttention(
    q: FLOAT[...],
    kv: FLOAT[...],
    window: FLOAT[...],
    sinks: FLOAT[...],
    positions: INT64[...],
    lengths: INT64[...],
    inv_freq: FLOAT[...],
    scale: float,
) -> tuple[FLOAT[...], FLOAT[...]]:
    out, window_out = SlidingWindowAttention(q, kv, window, sinks, positions, lengths, scale=scale)
    return TrailingRope(out, positions, inv_freq, sign=-1.0), window_out


def _define(attention: CustomOp, name: str, reference: Callable[..., Any], body: onnxscript.OnnxFunction) -> CustomOp:
    """The op `name`: what `attention` takes, then `inv_freq`; the shapes, attributes and state are its own."""
    return define(
        name,
        reference,
        inputs=(*attention.inputs, "inv_freq"),
        outputs=attention.outputs,
        attributes=attention.attributes,
        shape_rule=attention.shape_rule,
        functions=tuple(dict.fromkeys((body, *attention.functions, *TRAILING_ROPE.functions))),
        writes=attention.writes,
    )


DEROTATED_CSA = _define(CSA_ATTENTION, "DerotatedCSA", derotated_csa, DerotatedCSA)
DEROTATED_HCA = _define(HCA_ATTENTION, "DerotatedHCA", derotated_hca, DerotatedHCA)
DEROTATED_SLIDING_ATTENTION = _define(
    SLIDING_ATTENTION, "DerotatedSlidingAttention", derotated_sliding_attention, DerotatedSlidingAttention
)
