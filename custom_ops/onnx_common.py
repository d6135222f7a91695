"""ONNX helper functions that several op bodies call: token positions, ready compressed rows, ring state with lengths.

`past` and `present` of a state may be one buffer, and a runtime may order nodes as it likes. So a body reads a ring
only into a *history* (old rows, oldest first, then the chunk), takes everything from that copy, and writes the ring
with rows gathered from it: the write then needs the read, and no order of execution can swap them.
"""

from __future__ import annotations

from onnxscript import INT64, script
from onnxscript import opset23 as op
from onnxscript.onnx_types import FLOAT
from onnxscript.values import Opset

from .base import DOMAIN, OPSET_VERSION

v4c = Opset(DOMAIN, OPSET_VERSION)
"""The opset every function of ours is declared in."""


@script(v4c, default_opset=op)
def TokenPositions(x: FLOAT[...], positions: INT64[...]) -> INT64[...]:
    """Position of every token of the chunk, ``[B, S]``, from a tensor ``[B, S, ...]`` and ``positions [B]``."""
    chunk = op.Squeeze(op.Shape(x, start=1, end=2))
    steps = op.Range(op.Constant(value_int=0), chunk, op.Constant(value_int=1))
    return op.Add(op.Unsqueeze(positions, op.Constant(value_ints=[1])), steps)


@script(v4c, default_opset=op)
def ReadyRows(x: FLOAT[...], positions: INT64[...], lengths: INT64[...], ratio: int) -> tuple[INT64[...], INT64[...]]:
    """Compressed rows each token of `x` ``[B, S, ...]`` may read, ``[B, S]``, and the largest of them, ``[1]``.

    A row is ready once its window is complete; padding tokens are held to the rows that live tokens completed.
    """
    one = op.Constant(value_int=1)
    seen = op.Add(TokenPositions(x, positions), one)
    end = op.Unsqueeze(op.Add(positions, lengths), op.Constant(value_ints=[1]))
    ready = op.Div(op.Min(seen, end), op.Constant(value_int=ratio))
    return ready, op.Reshape(op.ReduceMax(ready, keepdims=0), op.Constant(value_ints=[1]))


@script(v4c, default_opset=op)
def RingIndices(
    ring: FLOAT[...], new: FLOAT[...], positions: INT64[...], lengths: INT64[...]
) -> tuple[INT64[...], INT64[...], INT64[...], INT64[...]]:
    """Where to read and write a ring state ``[B, R, ...]`` (slot = position mod R) around a chunk ``[B, S, ...]``.

    A caller does, for every ring of this size::

        history = op.Concat(op.GatherND(ring, slots, batch_dims=1), new, axis=1)
        ring_out = op.ScatterND(ring, target, op.GatherND(history, source))

    and reads the old ring nowhere else. Only live tokens are written, at most the last R of a row.

    Returns:
        slots ``[B, R, 1]``, the ring in position order; the position of each history row ``[B, R + S]``, below 0 where
        there is none yet (such rows hold anything, NaN included); source ``[n, 2]`` and target ``[n, 2]`` of the write.
    """
    axis = op.Constant(value_ints=[1])
    size = op.Shape(ring, start=1, end=2)
    total = op.Squeeze(op.Add(size, op.Shape(new, start=1, end=2)))
    steps = op.Range(op.Constant(value_int=0), total, op.Constant(value_int=1))
    start = op.Unsqueeze(positions, axis)
    history_positions = op.Sub(op.Add(start, steps), size)
    slot = op.Unsqueeze(op.Mod(history_positions, size), op.Constant(value_ints=[2]))
    slots = op.Slice(slot, op.Constant(value_ints=[0]), size, axis)

    end = op.Add(start, op.Unsqueeze(lengths, axis))
    oldest = op.Max(start, op.Sub(end, size))
    kept = op.And(op.GreaterOrEqual(history_positions, oldest), op.Less(history_positions, end))
    source = op.Transpose(op.NonZero(kept), perm=[1, 0])
    row = op.Slice(source, op.Constant(value_ints=[0]), axis, axis)
    target = op.Concat(row, op.GatherND(slot, source), axis=1)
    return slots, history_positions, source, target
