"""What a kernel call costs: bytes it must move and floating-point operations, from the shapes of its arguments.

The figures are lower bounds: every operand once, and of tables, expert stacks and caches only what the tokens of the
call touch. They are counted on shapes as the graph or as the packed weights have them, so ONNX nodes and calls of
compiled kernels are measured alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import ml_dtypes
import numpy as np


class Spec(Protocol):
    """Shape and dtype of a tensor: a `TensorSpec`, or what `v4c bench` saw, which must run without torch."""

    @property
    def shape(self) -> Sequence[Any]:
        """Known sizes."""

    @property
    def dtype(self) -> str:
        """Name of the element type."""


@dataclass(frozen=True)
class Cost:
    """Bytes to and from memory, and floating-point operations (a multiply-add is two)."""

    bytes: float = 0.0
    flops: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.flops + other.flops)


Specs = Sequence[Spec]

OP_ATTRIBUTE = "v4c.op"
"""Attribute of a kernel's PrimFunc: the operator it computes, as `cost_of` takes it."""
INPUTS_ATTRIBUTE = "v4c.inputs"
"""Attribute of a kernel's PrimFunc: how many of its arguments are inputs."""

STREAM_READ, MATRIX_PEAK = "v4c_stream_read", "v4c_matrix_peak"
"""Functions of every library that measure what costs are compared with: bytes and multiply-adds per second."""

GROUPED_PRODUCT = "GroupedMatMul"
"""What a MatMul with a block-diagonal weight is called here."""


def size(spec: Spec) -> int:
    """Number of elements."""
    return prod(int(d) for d in spec.shape)


def nbytes(spec: Spec) -> float:
    """Bytes in memory."""
    if spec.dtype in ("bool", "int4"):
        return size(spec) * (0.5 if spec.dtype == "int4" else 1)
    dtype = ml_dtypes.bfloat16 if spec.dtype == "bfloat16" else spec.dtype
    return size(spec) * np.dtype(dtype).itemsize


_PANEL_INPUTS = {1088: 32, 576: 32, 544: 32, 4160: 128, 128: 2}
"""Bytes of a block of 32 outputs, the last dimension of a weight packed in panels, to the inputs in it: of int8, int4,
FP4, FP8 with their scales, and of pairs of bfloat16."""


def weights_in(spec: Spec, k: int) -> int:
    """Number of weights in matrices of `k` inputs: as they are, packed in panels, or as rows of codes and scales."""
    if spec.dtype != "uint8":
        return size(spec)
    *lead, blocks, nbytes_of_block = (int(d) for d in spec.shape)
    inputs = _PANEL_INPUTS.get(nbytes_of_block)
    if inputs is not None and blocks == -(-k // inputs):
        return prod(lead) * 32 * k
    return prod(lead) * blocks * k


def cost_of(op: str, inputs: Specs, outputs: Specs, capacity: int | None = None) -> Cost:
    """Cost of one call.

    Args:
        op: ONNX operator; unique over the domains.
        inputs, outputs: all dimensions known. State that is written in place stands among the inputs only, or in both.
        capacity: tokens that the caches are made for. With it, and where `positions` has `values`, attention counts the
            rows that each token sees; otherwise every token is taken to see a full window and all compressed rows.
    """
    if op in _ATTENTION:
        return _ATTENTION[op](inputs, outputs, capacity)
    return _RULES.get(op, _elementwise)(inputs, outputs)


def _all(specs: Specs) -> float:
    return sum(nbytes(s) for s in specs)


def _tokens(spec: Spec) -> int:
    """Tokens of an activation ``[B, S, ...]``."""
    return prod(int(d) for d in spec.shape[:2])


def _elementwise(inputs: Specs, outputs: Specs) -> Cost:
    return Cost(_all(inputs) + _all(outputs), sum(size(s) for s in outputs))


def _product(inputs: Specs, outputs: Specs) -> Cost:
    """Every output is a sum over the inputs of its row."""
    return Cost(_all(inputs) + _all(outputs), 2.0 * int(inputs[0].shape[-1]) * sum(size(s) for s in outputs))


def _rows_of(table: Spec, count: int) -> float:
    """Bytes of `count` rows of a table."""
    return nbytes(table) / int(table.shape[0]) * count


def _lookup(inputs: Specs, outputs: Specs) -> Cost:
    table, indices = (inputs[0], inputs[1])
    return Cost(_rows_of(table, size(indices)) + nbytes(indices) + _all(outputs))


def _experts(inputs: Specs, outputs: Specs) -> Cost:
    """x, weights, indices, gate_up, down, then the shared expert's matrices; each chosen expert is read once."""
    x, _, indices, gate_up, down, *shared = inputs
    tokens, choices = _tokens(indices), size(indices)
    stack = [_rows_of(m, min(choices, int(m.shape[0]))) for m in (gate_up, down)]
    # The third of an expert's three matrices has as many weights as each of the two others.
    width = int(x.shape[-1])
    routed = 3.0 * choices * weights_in(gate_up, width) / int(gate_up.shape[0])
    return Cost(
        _all([x, x, *shared]) + nbytes(indices) * 1.5 + sum(stack),
        routed + 3.0 * tokens * sum(weights_in(m, width) for m in shared[:1]),
    )


def _hash_router(inputs: Specs, outputs: Specs) -> Cost:
    x, weight, indices = inputs
    return Cost(
        _all([x, indices]) + _rows_of(weight, size(indices)) + _all(outputs),
        2.0 * size(indices) * int(x.shape[-1]),
    )


def _router(inputs: Specs, outputs: Specs) -> Cost:
    x, weight, _ = inputs
    return Cost(_all(inputs) + _all(outputs), 2.0 * _tokens(x) * size(weight))


def _hash_route(inputs: Specs, outputs: Specs) -> Cost:
    logits, ids, table = inputs
    return Cost(_all([logits, ids]) + _rows_of(table, size(ids)) + _all(outputs))


@dataclass(frozen=True)
class _Rows:
    """The rows that all tokens of a call see together (each token its own), and how many different ones those are."""

    seen: int
    different: int


def _rows_seen(tokens: int, positions: Spec, window: int, rows: Spec | None, most: int, capacity: int | None) -> _Rows:
    """Raw rows of the window and up to `most` finished compressed ones, over `tokens` tokens."""
    held = int(rows.shape[1]) if rows is not None else 0
    starts: Sequence[int] = getattr(positions, "values", ())
    if capacity is None or not starts:
        return _Rows(tokens * (window + min(most, held)), tokens * (window + min(most, held)))
    ratio = max(1, round(capacity / held)) if held else 1
    chunk = tokens // len(starts)
    seen = different = 0
    for start in starts:
        known = np.arange(start + 1, start + chunk + 1)
        ready = np.minimum(known // ratio, held)
        seen += int(np.minimum(known, window).sum() + np.minimum(ready, most).sum())
        different += min(start, window) + chunk + int(ready[-1])
    return _Rows(seen, min(seen, different))


def _attend(q: Spec, rows: _Rows, window: Spec, others: Specs) -> Cost:
    """Every head of every token against the rows it sees, which all heads share: scores and sum."""
    heads, width = int(q.shape[2]), int(q.shape[3])
    row = nbytes(window) / max(1, _tokens(window))  # of the compressed ones as well
    return Cost(_all([q, q, *others]) + row * rows.different, 4.0 * heads * rows.seen * width)


def _csa(inputs: Specs, outputs: Specs, capacity: int | None) -> Cost:
    q, kv, window, rows, indices, _, positions, *rest = inputs
    seen = _rows_seen(_tokens(q), positions, int(window.shape[1]), rows, int(indices.shape[2]), capacity)
    return _attend(q, seen, window, [kv, indices, *rest])


def _hca(inputs: Specs, outputs: Specs, capacity: int | None) -> Cost:
    q, kv, window, rows, _, positions, *rest = inputs
    seen = _rows_seen(_tokens(q), positions, int(window.shape[1]), rows, int(rows.shape[1]), capacity)
    return _attend(q, seen, window, [kv, *rest])


def _sliding(inputs: Specs, outputs: Specs, capacity: int | None) -> Cost:
    q, kv, window, _, positions, *rest = inputs
    seen = _rows_seen(_tokens(q), positions, int(window.shape[1]), None, 0, capacity)
    return _attend(q, seen, window, [kv, *rest])


def _index(inputs: Specs, outputs: Specs, capacity: int | None) -> Cost:
    """Every index head against every ready row."""
    q, weights, rows, positions, *rest = inputs
    seen = _rows_seen(_tokens(q), positions, 0, rows, int(rows.shape[1]), capacity)
    read = min(seen.different, _tokens(rows)) * nbytes(rows) / _tokens(rows) if _tokens(rows) else 0.0
    heads, width = int(q.shape[2]), int(q.shape[3])
    return Cost(_all([q, weights, *rest]) + read + _all(outputs), 2.0 * heads * width * seen.seen)


def _compress(inputs: Specs, outputs: Specs) -> Cost:
    """Tokens go into the rings; per window of `ratio` tokens the ring is read and one row written."""
    kv, gate, bias, norm, inv_freq, state_kv, state_gate, rows, *_ = inputs
    tokens = _tokens(kv)
    windows = tokens / int(bias.shape[0])
    row = nbytes(rows) / max(1, int(rows.shape[1]))
    pooled = windows * (_all([state_kv, state_gate, bias, norm, inv_freq]) + row)
    return Cost(2 * _all([kv, gate]) + pooled, windows * 6.0 * size(state_kv))


def _compress_pair(inputs: Specs, outputs: Specs) -> Cost:
    shared = inputs[14:]
    first, second = inputs[:7], inputs[7:14]
    return sum((_compress([*s[:4], shared[0], *s[4:]], ()) for s in (first, second)), Cost())


def _mhc(inputs: Specs, outputs: Specs) -> Cost:
    """Streams once in and out, the mixing matrix once."""
    matrices = sum(size(s) for s in inputs if len(s.shape) == 2)
    tokens = _tokens(inputs[0])
    return Cost(_all(inputs) + _all(outputs), 2.0 * tokens * matrices + 8.0 * sum(size(s) for s in inputs[:1]))


def _engram_hash(inputs: Specs, outputs: Specs) -> Cost:
    ids, _, *rest = inputs
    return Cost(2 * nbytes(ids) + _all(rest) + _all(outputs))


def _engram_gate_conv(inputs: Specs, outputs: Specs) -> Cost:
    """The ring is read for the taps of each token, and each token written."""
    streams = inputs[2]
    return Cost(_all(inputs) + _all(outputs), 40.0 * size(streams))


_RULES: dict[str, Callable[[Specs, Specs], Cost]] = {
    "MatMul": _product,
    "RMSNormLinear": _product,
    GROUPED_PRODUCT: _product,
    "Gather": _lookup,
    "EngramLookup": _lookup,
    "GroupedExperts": _experts,
    "MixtureOfExperts": _experts,
    "HashRouter": _hash_router,
    "TopKRouter": _router,
    "HashRoute": _hash_route,
    "KVCompress": _compress,
    "KVCompressPair": _compress_pair,
    "MHCPre": _mhc,
    "MHCPost": _mhc,
    "MHCHead": _mhc,
    "MHCPreNorm": _mhc,
    "MHCPostPreNorm": _mhc,
    "EngramHash": _engram_hash,
    "EngramGateConv": _engram_gate_conv,
}

_ATTENTION: dict[str, Callable[[Specs, Specs, int | None], Cost]] = {
    "CompressedSparseAttention": _csa,
    "DerotatedCSA": _csa,
    "HeavilyCompressedAttention": _hca,
    "DerotatedHCA": _hca,
    "SlidingWindowAttention": _sliding,
    "DerotatedSlidingAttention": _sliding,
    "LightningIndex": _index,
    "RotaryLightningIndex": _index,
}
