"""Two KV compressors of one layer as one op: the sparse attention's and its indexer's.

They compress the same tokens with different widths, so a target can do both in one launch. The exporter leaves them as
two ops; the pass `merge-compressors` puts this one in their place.
"""

from __future__ import annotations

from collections.abc import Sequence

from onnxscript import INT64, script
from onnxscript import opset23 as op
from onnxscript.onnx_types import FLOAT
from torch import Tensor

from .base import Attributes, TensorSpec, define
from .kv_compress import KV_COMPRESS, KVCompress, kv_compress
from .onnx_common import v4c


def kv_compress_pair(
    kv: Tensor,
    gate: Tensor,
    bias: Tensor,
    norm: Tensor,
    state_kv: Tensor,
    state_gate: Tensor,
    rows: Tensor,
    index_kv: Tensor,
    index_gate: Tensor,
    index_bias: Tensor,
    index_norm: Tensor,
    index_state_kv: Tensor,
    index_state_gate: Tensor,
    index_rows: Tensor,
    inv_freq: Tensor,
    positions: Tensor,
    lengths: Tensor,
    ratio: int,
    eps: float,
) -> tuple[Tensor, ...]:
    """`kv_compress` twice, over the same tokens (DeepSeek-V4 paper, section on CSA).

    Args:
        kv, gate: ``[B, S, Z]`` float32, raw projections of the chunk for the first compressor.
        bias: ``[m, Z]`` float32, added to the gate by position in the window; m is `ratio`.
        norm: ``[C]`` float32 weight of the RMSNorm; Z is C or 2 C.
        state_kv, state_gate: ``[B, Q, Z]`` rings of the last Q = m Z / C raw rows, slot = position mod Q.
        rows: ``[B, N, C]`` compressed rows.
        index_kv, index_gate, index_bias, index_norm, index_state_kv, index_state_gate, index_rows: the same for the
            second compressor, with widths and N of its own.
        inv_freq: ``[R / 2]`` float32 angles per position, of both.
        positions, lengths: ``[B]`` int64, position of the first token and number of live tokens.
        ratio: tokens per window of both, m.
        eps: of both RMSNorms.

    Returns:
        The updated state_kv, state_gate, rows, index_state_kv, index_state_gate and index_rows.

    Raises:
        InputError: a ring does not hold the tokens a row is made from.
    """
    shared = (positions, lengths, ratio, eps)
    first = kv_compress(kv, gate, bias, norm, inv_freq, state_kv, state_gate, rows, *shared)
    second = kv_compress(
        index_kv, index_gate, index_bias, index_norm, inv_freq, index_state_kv, index_state_gate, index_rows, *shared
    )
    return *first, *second


def _shapes(inputs: Sequence[TensorSpec], attributes: Attributes) -> tuple[TensorSpec, ...]:
    return *inputs[4:7], *inputs[11:14]


@script(v4c, default_opset=op)
def KVCompressPair(
    kv: FLOAT[...],
    gate: FLOAT[...],
    bias: FLOAT[...],
    norm: FLOAT[...],
    state_kv: FLOAT[...],
    state_gate: FLOAT[...],
    rows: FLOAT[...],
    index_kv: FLOAT[...],
    index_gate: FLOAT[...],
    index_bias: FLOAT[...],
    index_norm: FLOAT[...],
    index_state_kv: FLOAT[...],
    index_state_gate: FLOAT[...],
    index_rows: FLOAT[...],
    inv_freq: FLOAT[...],
    positions: INT64[...],
    lengths: INT64[...],
    ratio: int,
    eps: float,
) -> tuple[FLOAT[...], FLOAT[...], FLOAT[...], FLOAT[...], FLOAT[...], FLOAT[...]]:
    state_kv_out, state_gate_out, rows_out = KVCompress(
        kv, gate, bias, norm, inv_freq, state_kv, state_gate, rows, positions, lengths, ratio=ratio, eps=eps
    )
    index_kv_out, index_gate_out, index_rows_out = KVCompress(
        index_kv, index_gate, index_bias, index_norm, inv_freq, index_state_kv, index_state_gate, index_rows,
        positions, lengths, ratio=ratio, eps=eps,
    )  # fmt: skip
    return state_kv_out, state_gate_out, rows_out, index_kv_out, index_gate_out, index_rows_out


_STATES = ("state_kv", "state_gate", "rows", "index_state_kv", "index_state_gate", "index_rows")

KV_COMPRESS_PAIR = define(
    "KVCompressPair",
    kv_compress_pair,
    inputs=(
        "kv", "gate", "bias", "norm", "state_kv", "state_gate", "rows",
        "index_kv", "index_gate", "index_bias", "index_norm", "index_state_kv", "index_state_gate", "index_rows",
        "inv_freq", "positions", "lengths",
    ),
    outputs=_STATES,
    attributes={"ratio": int, "eps": float},
    shape_rule=_shapes,
    functions=(KVCompressPair, *KV_COMPRESS.functions),
    writes={state: state for state in _STATES},
)  # fmt: skip
