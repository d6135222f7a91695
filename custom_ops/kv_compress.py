"""KV compressor: every window of `ratio` tokens becomes one row; with overlap, together with the window before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from onnxscript import INT64, script
from onnxscript import opset23 as op
from onnxscript.onnx_types import FLOAT
from torch import Tensor

from v4c.errors import InputError

from .base import Attributes, TensorSpec, define
from .onnx_common import RingIndices, v4c
from .torch_common import ring_history, ring_write
from .trailing_rope import RotateTrailing, rotate


def kv_compress(
    kv: Tensor,
    gate: Tensor,
    bias: Tensor,
    norm: Tensor,
    inv_freq: Tensor,
    state_kv: Tensor,
    state_gate: Tensor,
    rows: Tensor,
    positions: Tensor,
    lengths: Tensor,
    ratio: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compress the windows that this chunk completes (DeepSeek-V4 paper, sections on CSA and HCA).

    A row is softmax(gate + bias) over its slots, times kv, summed; then RMSNorm and RoPE at the window's first
    position. Without overlap (Z == C) the slots are the window's m tokens. With overlap (Z == 2 C) they are the first
    halves of the previous window's tokens, then the second halves of this window's; the first window has no previous.

    Args:
        kv, gate: ``[B, S, Z]`` float32, raw projections of the chunk.
        bias: ``[m, Z]`` float32, added to the gate by position in the window; m is `ratio`.
        norm: ``[C]`` float32 weight of the RMSNorm; Z is C or 2 C.
        inv_freq: ``[R / 2]`` float32 angles per position.
        state_kv, state_gate: ``[B, Q, Z]`` rings of the last Q = m Z / C raw rows, slot = position mod Q.
        rows: ``[B, N, C]`` compressed rows; row w is that of positions ``[w m, (w + 1) m)``.
        positions, lengths: ``[B]`` int64, position of the first token and number of live tokens.
        ratio: tokens per window, m.
        eps: of the RMSNorm.

    Returns:
        The updated state_kv, state_gate and rows.

    Raises:
        InputError: the ring does not hold the tokens a row is made from.
    """
    width, ring = rows.shape[2], state_kv.shape[1]
    halves = kv.shape[2] // width
    if ring != halves * ratio or kv.shape[2] != halves * width:
        raise InputError(f"kv_compress: expected state of {halves * ratio} slots for ratio {ratio}, found {ring}")
    history_kv, history_positions = ring_history(state_kv, kv, positions)
    history_gate, _ = ring_history(state_gate, gate, positions)

    start, end = positions[:, None], (positions + lengths)[:, None]
    live = (history_positions >= start) & (history_positions < end)
    row, last = (live & ((history_positions + 1) % ratio == 0)).nonzero(as_tuple=True)
    window = history_positions[row, last] // ratio

    slot = torch.arange(ring, device=kv.device)
    index = last[:, None] + slot - (ring - 1)
    half = slot // ratio
    missing = (history_positions[row[:, None], index] < 0)[..., None]
    values = history_kv.unflatten(2, (halves, width))[row[:, None], index, half]
    gates = history_gate.unflatten(2, (halves, width))[row[:, None], index, half]
    gates = gates + bias.unflatten(1, (halves, width))[slot % ratio, half]
    share = gates.masked_fill(missing, -torch.inf).softmax(1)
    pooled = (values.masked_fill(missing, 0.0) * share).sum(1)

    normed = pooled * torch.rsqrt(pooled.square().mean(-1, keepdim=True) + eps) * norm
    rows = rows.clone()
    rows[row, window] = rotate(normed, window * ratio, inv_freq, 1.0)
    return ring_write(state_kv, kv, positions, lengths), ring_write(state_gate, gate, positions, lengths), rows


def _shapes(inputs: Sequence[TensorSpec], attributes: Attributes) -> tuple[TensorSpec, ...]:
    return inputs[5], inputs[6], inputs[7]


@script(v4c, default_opset=op)
def KVCompress(
    kv: FLOAT[...],
    gate: FLOAT[...],
    bias: FLOAT[...],
    norm: FLOAT[...],
    inv_freq: FLOAT[...],
    state_kv: FLOAT[...],
    state_gate: FLOAT[...],
    rows: FLOAT[...],
    positions: INT64[...],
    lengths: INT64[...],
    ratio: int,
    eps: float,
) -> tuple[FLOAT[...], FLOAT[...], FLOAT[...]]:
    zero = op.Constant(value_int=0)
    one = op.Constant(value_ints=[1])
    two = op.Constant(value_ints=[2])
    flat = op.Constant(value_ints=[-1])
    m = op.Constant(value_int=ratio)

    slots, history_positions, source, target = RingIndices(state_kv, kv, positions, lengths)
    history_kv = op.Concat(op.GatherND(state_kv, slots, batch_dims=1), kv, axis=1)
    history_gate = op.Concat(op.GatherND(state_gate, slots, batch_dims=1), gate, axis=1)

    # A window is complete where its last token is live: n of them, each known by the index of that token when batch
    # and history are one axis.
    after = op.Add(history_positions, one)
    start = op.Unsqueeze(positions, one)
    end = op.Unsqueeze(op.Add(positions, lengths), one)
    live = op.And(op.GreaterOrEqual(history_positions, start), op.LessOrEqual(after, end))
    complete = op.And(live, op.Equal(op.Mod(after, m), zero))
    last = op.Transpose(op.NonZero(op.Reshape(complete, flat)), perm=[1, 0])  # [n, 1]
    last_position = op.Gather(op.Reshape(history_positions, flat), last)  # [n, 1]

    # Slot k is k - (Q - 1) tokens from the last; its half of the wide row is k // m.
    ring = op.Shape(state_kv, start=1, end=2)
    slot = op.Range(zero, op.Squeeze(ring), op.Constant(value_int=1))
    back = op.Sub(slot, op.Sub(ring, one))
    halves = op.Div(ring, m)
    half = op.Div(slot, m)
    index = op.Add(op.Mul(op.Add(last, back), halves), half)  # [n, Q] into rows of one half
    missing = op.Unsqueeze(op.Less(op.Add(last_position, back), zero), two)
    half_rows = op.Concat(flat, op.Shape(rows, start=2, end=3), axis=0)
    values = op.Gather(op.Reshape(history_kv, half_rows), index)  # [n, Q, C]
    gates = op.Gather(op.Reshape(history_gate, half_rows), index)
    slot_bias = op.Gather(op.Reshape(bias, half_rows), op.Add(op.Mul(op.Mod(slot, m), halves), half))
    nothing = op.Constant(value_float=float("-inf"))
    share = op.Softmax(op.Where(missing, nothing, op.Add(gates, slot_bias)), axis=1)
    values = op.Where(missing, op.Constant(value_float=0.0), values)
    pooled = op.ReduceSum(op.Mul(values, share), one)  # [n, 1, C]

    normed = op.RMSNormalization(pooled, norm, axis=-1, epsilon=eps)
    window = op.Div(last_position, m)
    rotated = op.Squeeze(RotateTrailing(normed, op.Mul(window, m), inv_freq, sign=1.0), one)
    batch = op.Div(last, op.Shape(history_kv, start=1, end=2))
    return (
        op.ScatterND(state_kv, target, op.GatherND(history_kv, source)),
        op.ScatterND(state_gate, target, op.GatherND(history_gate, source)),
        op.ScatterND(rows, op.Concat(batch, window, axis=1), rotated),
    )


KV_COMPRESS = define(
    "KVCompress",
    kv_compress,
    inputs=(
        "kv", "gate", "bias", "norm", "inv_freq", "state_kv", "state_gate", "rows", "positions", "lengths",
    ),
    outputs=("state_kv", "state_gate", "rows"),
    attributes={"ratio": int, "eps": float},
    shape_rule=_shapes,
    functions=(KVCompress, RingIndices, RotateTrailing),
    writes={"state_kv": "state_kv", "state_gate": "state_gate", "rows": "rows"},
)  # fmt: skip
