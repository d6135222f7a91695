"""Lightning indexer that rotates its queries itself, so that the rotated ones are never stored.

The exporter leaves the rotation before the indexer as an op of its own; the pass `fuse-index-rope` puts this op in the
place of the two.
"""

from __future__ import annotations

from collections.abc import Sequence

from onnxscript import INT64, script
from onnxscript import opset23 as op
from onnxscript.onnx_types import FLOAT
from torch import Tensor

from .base import Attributes, TensorSpec, define
from .lightning_index import LIGHTNING_INDEX, LightningIndex, lightning_index
from .onnx_common import v4c
from .trailing_rope import TRAILING_ROPE, TrailingRope, trailing_rope


def rotary_lightning_index(
    q: Tensor,
    weights: Tensor,
    index_rows: Tensor,
    positions: Tensor,
    lengths: Tensor,
    inv_freq: Tensor,
    ratio: int,
    top_k: int,
) -> Tensor:
    """Interleaved RoPE on the queries' trailing dims, then `lightning_index` (DeepSeek-V4 paper, section on CSA).

    Args:
        q: ``[B, S, J, I]`` float32, indexer queries before rotation.
        weights: ``[B, S, J]`` float32, one per indexer head.
        index_rows: ``[B, N, I]`` float32, the indexer's compressed rows, which are rotated.
        positions, lengths: ``[B]`` int64, position of the first token and number of live tokens.
        inv_freq: ``[R / 2]`` float32 angles per position; R trailing dims are rotated.
        ratio: tokens per compressed row.
        top_k: rows to choose.

    Returns:
        ``[B, S, top_k]`` int64.
    """
    rotated = trailing_rope(q, positions, inv_freq, 1.0)
    return lightning_index(rotated, weights, index_rows, positions, lengths, ratio, top_k)


def _shapes(inputs: Sequence[TensorSpec], attributes: Attributes) -> tuple[TensorSpec, ...]:
    return LIGHTNING_INDEX.shape_rule(inputs[:5], attributes)


@script(v4c, default_opset=op)
def RotaryLightningIndex(
    q: FLOAT[...],
    weights: FLOAT[...],
    index_rows: FLOAT[...],
    positions: INT64[...],
    lengths: INT64[...],
    inv_freq: FLOAT[...],
    ratio: int,
    top_k: int,
) -> INT64[...]:
    rotated = TrailingRope(q, positions, inv_freq, sign=1.0)
    return LightningIndex(rotated, weights, index_rows, positions, lengths, ratio=ratio, top_k=top_k)


ROTARY_LIGHTNING_INDEX = define(
    "RotaryLightningIndex",
    rotary_lightning_index,
    inputs=("q", "weights", "index_rows", "positions", "lengths", "inv_freq"),
    outputs=("indices",),
    attributes={"ratio": int, "top_k": int},
    shape_rule=_shapes,
    functions=tuple(dict.fromkeys((RotaryLightningIndex, *TRAILING_ROPE.functions, *LIGHTNING_INDEX.functions))),
)
