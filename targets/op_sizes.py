"""The static sizes by which a target makes the kernel of an op, from the specs of its inputs and its attributes.

They are the same for every target and come first among a kernel factory's arguments; what else a target's factories
take (formats of caches, instructions) is its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from v4c.custom_ops import TensorSpec

Inputs = Mapping[str, TensorSpec]
"""Specs by name; weights as in the graph."""
Attributes = Mapping[str, Any]
Sizes = Callable[[Inputs, Attributes], tuple[Any, ...]]


def size(inputs: Inputs, name: str, axis: int) -> int:
    """A static dimension of an input."""
    return int(inputs[name].shape[axis])


def _attention(i: Inputs) -> tuple[int, int, int]:
    """Heads, head width and window."""
    return size(i, "q", 2), size(i, "q", 3), size(i, "window", 1)


def _rotary(i: Inputs) -> int:
    """Dims that are rotated; 0 of an op that rotates none."""
    return 2 * size(i, "inv_freq", 0) if "inv_freq" in i else 0


def _compressed(i: Inputs, prefix: str = "") -> tuple[int, int]:
    """Widths of a compressor's projections and of its rows."""
    return size(i, f"{prefix}kv", 2), size(i, f"{prefix}norm", 0)


def _streams(i: Inputs) -> tuple[int, int]:
    """Number of streams and their width."""
    return size(i, "streams", 2), size(i, "streams", 3)


def _csa(i: Inputs, a: Attributes) -> tuple[Any, ...]:
    return *_attention(i), size(i, "indices", 2), a["scale"], _rotary(i)


def _hca(i: Inputs, a: Attributes) -> tuple[Any, ...]:
    return *_attention(i), a["ratio"], a["scale"], _rotary(i)


def _sliding(i: Inputs, a: Attributes) -> tuple[Any, ...]:
    return *_attention(i), a["scale"], _rotary(i)


def _index(i: Inputs, a: Attributes) -> tuple[Any, ...]:
    return size(i, "q", 2), size(i, "q", 3), a["ratio"], a["top_k"], _rotary(i)


def _experts(i: Inputs, a: Attributes) -> tuple[Any, ...]:
    """Experts, hidden size, expert width, experts per token, clamp and weight dtype of a routed expert op."""
    return (
        size(i, "gate_up", 0), size(i, "x", 2), size(i, "down", 2), size(i, "indices", 2), a["limit"],
        i["gate_up"].dtype,
    )  # fmt: skip


SIZES: dict[str, Sizes] = {
    "TrailingRope": lambda i, a: (size(i, "x", 2), size(i, "x", 3), _rotary(i), a["sign"]),
    "RotaryQueryKV": lambda i, a: (size(i, "q", 2), size(i, "q", 3), _rotary(i), a["q_eps"], a["kv_eps"]),
    "KVCompress": lambda i, a: (*_compressed(i), _rotary(i), a["ratio"], a["eps"]),
    "KVCompressPair": lambda i, a: (
        *_compressed(i), *_compressed(i, "index_"), _rotary(i), a["ratio"], a["eps"]
    ),
    "LightningIndex": _index,
    "RotaryLightningIndex": _index,
    "CompressedSparseAttention": _csa,
    "DerotatedCSA": _csa,
    "HeavilyCompressedAttention": _hca,
    "DerotatedHCA": _hca,
    "SlidingWindowAttention": _sliding,
    "DerotatedSlidingAttention": _sliding,
    "MHCPre": lambda i, a: (*_streams(i), a["iterations"], a["hc_eps"], a["norm_eps"]),
    "MHCPreNorm": lambda i, a: (*_streams(i), a["iterations"], a["hc_eps"], a["norm_eps"], a["eps"]),
    "MHCPostPreNorm": lambda i, a: (*_streams(i), a["iterations"], a["hc_eps"], a["norm_eps"], a["eps"]),
    "MHCPost": lambda i, a: _streams(i),
    "MHCHead": lambda i, a: (*_streams(i), a["hc_eps"], a["norm_eps"]),
    "TopKRoute": lambda i, a: (size(i, "logits", 2), a["top_k"], a["scaling"]),
    "HashRoute": lambda i, a: (size(i, "logits", 2), size(i, "table", 1), a["scaling"]),
    "TopKRouter": lambda i, a: (size(i, "weight", 0), size(i, "x", 2), a["top_k"], a["scaling"], i["weight"].dtype),
    "HashRouter": lambda i, a: (size(i, "weight", 0), size(i, "x", 2), size(i, "indices", 2), a["scaling"]),
    "ClampedSwiGLU": lambda i, a: (size(i, "gate", 2), a["limit"]),
    "GroupedExperts": _experts,
    "MixtureOfExperts": lambda i, a: (*_experts(i, a), size(i, "shared_down", 1)),
    "EngramHash": lambda i, a: (size(i, "multipliers", 0), size(i, "primes", 0), a["pad_id"]),
    "EngramLookup": lambda i, a: (size(i, "addresses", 2), size(i, "table", 1), i["table"].dtype),
    "EngramGateConv": lambda i, a: (*_streams(i), size(i, "conv_weight", 1), a["dilation"], a["eps"]),
}  # fmt: skip
"""By op."""
