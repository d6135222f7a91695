"""What the three attention ops share: softmax with a sink over the keys a token may see, and its sliding window.

One row is both key and value and is shared by all heads (multi-query). Rows that no token may see can hold anything,
NaN included, so they are replaced by 0 and not only given no weight.
"""

from __future__ import annotations

import torch
from onnxscript import BOOL, INT64, script
from onnxscript import opset23 as op
from onnxscript.onnx_types import FLOAT
from torch import Tensor

from .onnx_common import v4c
from .torch_common import blocks, ready_rows, ring_history, ring_write, token_positions


def attend(q: Tensor, keys: Tensor, visible: Tensor, sinks: Tensor, scale: float) -> Tensor:
    """Multi-query attention in which a sink logit per head stands in the softmax denominator only.

    Args:
        q: ``[B, T, H, C]``.
        keys: ``[B, n, C]``, the same for all tokens, or ``[B, T, n, C]``.
        visible: ``[B, T, n]`` bool.
        sinks: ``[H]``.
        scale: factor on ``q . key``.

    Returns:
        ``[B, T, H, C]``.
    """
    shared = keys.ndim == 3
    keys = keys.masked_fill(~(visible.any(1) if shared else visible)[..., None], 0.0)
    layout = "bnc" if shared else "btnc"
    scores = torch.einsum(f"bthc,{layout}->bthn", q, keys) * scale
    scores = scores.masked_fill(~visible[:, :, None], -torch.inf)
    sink = sinks[:, None].expand(*q.shape[:3], 1)
    share = torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]
    return torch.einsum(f"bthn,{layout}->bthc", share, keys)


def attend_shared(
    q: Tensor,
    kv: Tensor,
    window: Tensor,
    rows: Tensor | None,
    sinks: Tensor,
    positions: Tensor,
    lengths: Tensor,
    ratio: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention over the sliding window and, if `rows` are given, every ready compressed row; and the new window.

    Shapes are those of the ops; the chunk is worked through in blocks, so memory does not grow with its square.
    """
    batch, chunk, heads, _ = q.shape
    size = window.shape[1]
    history, history_positions = ring_history(window, kv, positions)
    ready = positions.new_zeros(batch, chunk) if rows is None else ready_rows(positions, lengths, chunk, ratio)
    compressed = history[:, :0] if rows is None else rows[:, : int(ready.max())]
    row = torch.arange(compressed.shape[1], device=q.device)
    token = token_positions(positions, chunk)
    out = torch.empty_like(q)
    for block in blocks(chunk, batch * heads * (2 * size + len(row)), limit=max(size, 64)):
        # Token j is history row j + size, so what the block sees starts one row after its first token's index.
        near = slice(block.start + 1, block.stop + size)
        key = history_positions[:, None, near]
        age = token[:, block, None] - key
        recent = (age >= 0) & (age < size) & (key >= 0)
        visible = torch.cat([recent, row < ready[:, block, None]], dim=2)
        out[:, block] = attend(q[:, block], torch.cat([history[:, near], compressed], dim=1), visible, sinks, scale)
    return out, ring_write(window, kv, positions, lengths)


@script(v4c, default_opset=op)
def Attend(q: FLOAT[...], keys: FLOAT[...], visible: BOOL[...], sinks: FLOAT[...], scale: float) -> FLOAT[...]:
    """As `attend`, for keys ``[B, 1, n, C]`` or ``[B, S, n, C]`` that hold no NaN."""
    last = op.Constant(value_ints=[-1])
    scores = op.Mul(op.MatMul(q, op.Transpose(keys, perm=[0, 1, 3, 2])), op.Constant(value_float=scale))
    nothing = op.Constant(value_float=float("-inf"))
    scores = op.Where(op.Unsqueeze(visible, op.Constant(value_ints=[2])), scores, nothing)
    column = op.Concat(op.Shape(q, end=3), op.Constant(value_ints=[1]), axis=0)
    sink = op.Expand(op.Unsqueeze(sinks, last), column)
    share = op.Softmax(op.Concat(scores, sink, axis=-1), axis=-1)
    return op.MatMul(op.Slice(share, op.Constant(value_ints=[0]), last, last), keys)


@script(v4c, default_opset=op)
def AttendShared(
    q: FLOAT[...],
    keys: FLOAT[...],
    visible: BOOL[...],
    sinks: FLOAT[...],
    scale: float,
) -> FLOAT[...]:
    """As `attend`, for keys ``[B, n, C]`` that all tokens share."""
    axis = op.Constant(value_ints=[1])
    used = op.Transpose(op.ReduceMax(visible, axis), perm=[0, 2, 1])  # [B, n, 1]
    clean = op.Where(used, keys, op.Constant(value_float=0.0))
    return Attend(q, op.Unsqueeze(clean, axis), visible, sinks, scale=scale)


@script(v4c, default_opset=op)
def WindowVisible(window: FLOAT[...], history_positions: INT64[...]) -> BOOL[...]:
    """Which rows of the history ``[B, W + S]`` each token of the chunk sees, ``[B, S, W + S]``: its last W."""
    one = op.Constant(value_ints=[1])
    size = op.Shape(window, start=1, end=2)
    total = op.Shape(history_positions, start=1, end=2)
    queries = op.Unsqueeze(op.Slice(history_positions, size, total, one), op.Constant(value_ints=[2]))
    keys = op.Unsqueeze(history_positions, one)
    age = op.Sub(queries, keys)
    recent = op.Equal(op.Mod(age, size), age)  # 0 <= age < W
    return op.And(recent, op.GreaterOrEqual(keys, op.Constant(value_int=0)))
