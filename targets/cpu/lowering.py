"""Which CPU kernel stands for which op: the importer's `Kernels` protocol, answered from the shapes of the inputs.

One line per op picks the static sizes a kernel factory needs; everything else about a kernel is in `kernels/`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from v4c.custom_ops import CustomOp, TensorSpec
from v4c.errors import UnsupportedError
from v4c.passes.relax.layouts import WeightSpec

from . import packing
from .kernels.attention import compressed_sparse_attention, heavily_compressed_attention, sliding_window_attention
from .kernels.compress import kv_compress
from .kernels.engram import engram_gate_conv, engram_hash, engram_lookup
from .kernels.experts import grouped_experts
from .kernels.grouped_linear import grouped_linear
from .kernels.index import lightning_index
from .kernels.linear import linear
from .kernels.mhc import mhc_head, mhc_post, mhc_pre
from .kernels.rms_norm import rms_norm
from .kernels.rope import trailing_rope
from .kernels.routes import hash_route, topk_route
from .kernels.swiglu import swiglu

Inputs = Mapping[str, TensorSpec]
Attributes = Mapping[str, Any]


def _size(inputs: Inputs, name: str, axis: int) -> int:
    """A static dimension of an input."""
    return int(inputs[name].shape[axis])


def _attention_sizes(i: Inputs) -> tuple[int, int, int]:
    """Heads, head width and window of an attention op."""
    return _size(i, "q", 2), _size(i, "q", 3), _size(i, "window", 1)


def _streams(i: Inputs) -> tuple[int, int]:
    """Number of streams and their width."""
    return _size(i, "streams", 2), _size(i, "streams", 3)


_CUSTOM: dict[str, Callable[[Inputs, Attributes], Any]] = {
    "TrailingRope": lambda i, a: trailing_rope(
        _size(i, "x", 2), _size(i, "x", 3), 2 * _size(i, "inv_freq", 0), a["sign"]
    ),
    "KVCompress": lambda i, a: kv_compress(
        _size(i, "kv", 2), _size(i, "rows", 2), 2 * _size(i, "inv_freq", 0), a["ratio"], a["eps"]
    ),
    "LightningIndex": lambda i, a: lightning_index(_size(i, "q", 2), _size(i, "q", 3), a["ratio"], a["top_k"]),
    "CompressedSparseAttention": lambda i, a: compressed_sparse_attention(
        *_attention_sizes(i), _size(i, "indices", 2), a["scale"]
    ),
    "HeavilyCompressedAttention": lambda i, a: heavily_compressed_attention(
        *_attention_sizes(i), a["ratio"], a["scale"]
    ),
    "SlidingWindowAttention": lambda i, a: sliding_window_attention(*_attention_sizes(i), a["scale"]),
    "MHCPre": lambda i, a: mhc_pre(*_streams(i), a["iterations"], a["hc_eps"], a["norm_eps"]),
    "MHCPost": lambda i, a: mhc_post(*_streams(i)),
    "MHCHead": lambda i, a: mhc_head(*_streams(i), a["hc_eps"], a["norm_eps"]),
    "TopKRoute": lambda i, a: topk_route(_size(i, "logits", 2), a["top_k"], a["scaling"]),
    "HashRoute": lambda i, a: hash_route(_size(i, "logits", 2), _size(i, "table", 1), a["scaling"]),
    "GroupedExperts": lambda i, a: grouped_experts(
        _size(i, "gate_up", 0), _size(i, "x", 2), _size(i, "down", 2), _size(i, "indices", 2), a["limit"],
        i["gate_up"].dtype,
    ),
    "ClampedSwiGLU": lambda i, a: swiglu(_size(i, "gate", 2), a["limit"]),
    "EngramHash": lambda i, a: engram_hash(_size(i, "multipliers", 0), _size(i, "primes", 0), a["pad_id"]),
    "EngramLookup": lambda i, a: engram_lookup(
        _size(i, "addresses", 2), _size(i, "table", 1), i["table"].dtype
    ),
    "EngramGateConv": lambda i, a: engram_gate_conv(
        *_streams(i), _size(i, "conv_weight", 1), a["dilation"], a["eps"]
    ),
}  # fmt: skip


class CPUKernels:
    """CPU kernels for the importer."""

    def custom(self, op: CustomOp, inputs: Sequence[TensorSpec], attributes: Attributes) -> Any:
        if op.name not in _CUSTOM:
            raise UnsupportedError(f"operator {op.name}: no CPU kernel")
        return _CUSTOM[op.name](dict(zip(op.inputs, inputs, strict=True)), attributes)

    def linear(self, n: int, k: int, dtype: str) -> Any:
        return linear(n, k, dtype)

    def grouped_linear(self, groups: int, n: int, k: int, dtype: str) -> Any:
        return grouped_linear(groups, n, k, dtype)

    def rms_norm(self, width: int, eps: float, weighted: bool) -> Any:
        return rms_norm(width, eps, weighted)

    def packed(self, weight: WeightSpec) -> TensorSpec:
        return packing.packed(weight)
