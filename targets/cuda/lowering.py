"""Which CUDA kernel stands for which op: the importer's `Kernels` protocol, answered from the shapes of the inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from v4c.custom_ops import CustomOp, TensorSpec
from v4c.errors import UnsupportedError
from v4c.passes.relax.kernels import Kernel
from v4c.passes.relax.layouts import WeightSpec

from . import packing
from .kernels.attention import compressed_sparse_attention, heavily_compressed_attention, sliding_window_attention
from .kernels.compress import kv_compress, kv_compress_pair
from .kernels.engram import engram_gate_conv, engram_hash, engram_lookup
from .kernels.experts import grouped_experts, mixture_of_experts
from .kernels.index import lightning_index
from .kernels.mhc import mhc_head, mhc_post, mhc_post_pre_norm, mhc_pre, mhc_pre_norm
from .kernels.products import grouped_linear, merged_linear
from .kernels.routing import hash_route, hash_router, topk_route, topk_router
from .kernels.rows import add, rms_norm, rotary_query_kv, swiglu, trailing_rope
from .scheduling import Scheduler

Inputs = Mapping[str, TensorSpec]
Attributes = Mapping[str, Any]


def _size(inputs: Inputs, name: str, axis: int) -> int:
    """A static dimension of an input."""
    return int(inputs[name].shape[axis])


def _attention_sizes(i: Inputs) -> tuple[int, int, int]:
    """Heads, head width and window of an attention op."""
    return _size(i, "q", 2), _size(i, "q", 3), _size(i, "window", 1)


def _rotary(i: Inputs) -> int:
    """Dims that are rotated; 0 of an op that rotates none."""
    return 2 * _size(i, "inv_freq", 0) if "inv_freq" in i else 0


def _csa(i: Inputs, a: Attributes) -> Kernel:
    return Kernel(compressed_sparse_attention, (*_attention_sizes(i), _size(i, "indices", 2), a["scale"], _rotary(i)))


def _hca(i: Inputs, a: Attributes) -> Kernel:
    return Kernel(heavily_compressed_attention, (*_attention_sizes(i), a["ratio"], a["scale"], _rotary(i)))


def _sliding(i: Inputs, a: Attributes) -> Kernel:
    return Kernel(sliding_window_attention, (*_attention_sizes(i), a["scale"], _rotary(i)))


def _index(i: Inputs, a: Attributes) -> Kernel:
    return Kernel(lightning_index, (_size(i, "q", 2), _size(i, "q", 3), a["ratio"], a["top_k"], _rotary(i)))


def _experts(i: Inputs, a: Attributes) -> tuple[Any, ...]:
    """Experts, hidden size, expert width, experts per token, clamp and weight dtype of a routed expert op."""
    return (
        _size(i, "gate_up", 0), _size(i, "x", 2), _size(i, "down", 2), _size(i, "indices", 2), a["limit"],
        i["gate_up"].dtype,
    )  # fmt: skip


def _streams(i: Inputs) -> tuple[int, int]:
    """Number of streams and their width."""
    return _size(i, "streams", 2), _size(i, "streams", 3)


_CUSTOM: dict[str, Callable[[Inputs, Attributes], Kernel]] = {
    "TrailingRope": lambda i, a: Kernel(trailing_rope, (_size(i, "x", 2), _size(i, "x", 3), _rotary(i), a["sign"])),
    "RotaryQueryKV": lambda i, a: Kernel(
        rotary_query_kv, (_size(i, "q", 2), _size(i, "q", 3), _rotary(i), a["q_eps"], a["kv_eps"])
    ),
    "KVCompress": lambda i, a: Kernel(
        kv_compress, (_size(i, "kv", 2), _size(i, "rows", 2), _rotary(i), a["ratio"], a["eps"])
    ),
    "KVCompressPair": lambda i, a: Kernel(
        kv_compress_pair,
        (
            _size(i, "kv", 2), _size(i, "rows", 2), _size(i, "index_kv", 2), _size(i, "index_rows", 2), _rotary(i),
            a["ratio"], a["eps"],
        ),
    ),
    "LightningIndex": _index,
    "RotaryLightningIndex": _index,
    "CompressedSparseAttention": _csa,
    "DerotatedCSA": _csa,
    "HeavilyCompressedAttention": _hca,
    "DerotatedHCA": _hca,
    "SlidingWindowAttention": _sliding,
    "DerotatedSlidingAttention": _sliding,
    "MHCPre": lambda i, a: Kernel(mhc_pre, (*_streams(i), a["iterations"], a["hc_eps"], a["norm_eps"])),
    "MHCPreNorm": lambda i, a: Kernel(
        mhc_pre_norm, (*_streams(i), a["iterations"], a["hc_eps"], a["norm_eps"], a["eps"])
    ),
    "MHCPostPreNorm": lambda i, a: Kernel(
        mhc_post_pre_norm, (*_streams(i), a["iterations"], a["hc_eps"], a["norm_eps"], a["eps"])
    ),
    "MHCPost": lambda i, a: Kernel(mhc_post, _streams(i)),
    "MHCHead": lambda i, a: Kernel(mhc_head, (*_streams(i), a["hc_eps"], a["norm_eps"])),
    "TopKRoute": lambda i, a: Kernel(topk_route, (_size(i, "logits", 2), a["top_k"], a["scaling"])),
    "HashRoute": lambda i, a: Kernel(hash_route, (_size(i, "logits", 2), _size(i, "table", 1), a["scaling"])),
    "TopKRouter": lambda i, a: Kernel(
        topk_router, (_size(i, "weight", 0), _size(i, "x", 2), a["top_k"], a["scaling"], i["weight"].dtype)
    ),
    "HashRouter": lambda i, a: Kernel(
        hash_router, (_size(i, "weight", 0), _size(i, "x", 2), _size(i, "indices", 2), a["scaling"])
    ),
    "ClampedSwiGLU": lambda i, a: Kernel(swiglu, (_size(i, "gate", 2), a["limit"])),
    "GroupedExperts": lambda i, a: Kernel(grouped_experts, _experts(i, a)),
    "MixtureOfExperts": lambda i, a: Kernel(mixture_of_experts, (*_experts(i, a), _size(i, "shared_down", 1))),
    "EngramHash": lambda i, a: Kernel(
        engram_hash, (_size(i, "multipliers", 0), _size(i, "primes", 0), a["pad_id"])
    ),
    "EngramLookup": lambda i, a: Kernel(
        engram_lookup, (_size(i, "addresses", 2), _size(i, "table", 1), i["table"].dtype)
    ),
    "EngramGateConv": lambda i, a: Kernel(
        engram_gate_conv, (*_streams(i), _size(i, "conv_weight", 1), a["dilation"], a["eps"])
    ),
}  # fmt: skip


class CUDAKernels:
    """CUDA kernels for the importer; `scheduler` chooses how each cuts its work."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler

    def custom(self, op: CustomOp, inputs: Sequence[TensorSpec], attributes: Attributes) -> Kernel:
        if op.name not in _CUSTOM:
            raise UnsupportedError(f"operator {op.name}: no CUDA kernel")
        return self.scheduler.scheduled(_CUSTOM[op.name](dict(zip(op.inputs, inputs, strict=True)), attributes))

    def linear(self, sizes: tuple[int, ...], k: int, dtype: str, norm_eps: float | None) -> Kernel:
        return self.scheduler.scheduled(Kernel(merged_linear, (sizes, k, dtype, norm_eps)))

    def linear_unpacked(self, n: int, k: int, dtype: str) -> Kernel:
        # A weight lies the same way whether it is only multiplied or rows of it are gathered too.
        return self.linear((n,), k, dtype, None)

    def grouped_linear(self, groups: int, n: int, k: int, dtype: str) -> Kernel:
        return self.scheduler.scheduled(Kernel(grouped_linear, (groups, n, k, dtype)))

    def rms_norm(self, width: int, eps: float, weighted: bool) -> Kernel:
        return Kernel(rms_norm, (width, eps, weighted))

    def add(self, width: int) -> Kernel:
        return Kernel(add, (width,))

    def packed(self, weight: WeightSpec) -> TensorSpec:
        return packing.packed(weight)
