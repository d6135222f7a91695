"""Which CUDA kernel stands for which op: the importer's `Kernels` protocol, answered from the shapes of the inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from v4c.custom_ops import CustomOp, TensorSpec
from v4c.errors import UnsupportedError
from v4c.passes.relax.kernels import Kernel
from v4c.passes.relax.layouts import Storage, WeightSpec

from ..op_sizes import SIZES, Attributes
from ..scheduler import Scheduler
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

_FACTORIES: dict[str, Callable[..., Any]] = {
    "TrailingRope": trailing_rope,
    "RotaryQueryKV": rotary_query_kv,
    "KVCompress": kv_compress,
    "KVCompressPair": kv_compress_pair,
    "LightningIndex": lightning_index,
    "RotaryLightningIndex": lightning_index,
    "CompressedSparseAttention": compressed_sparse_attention,
    "DerotatedCSA": compressed_sparse_attention,
    "HeavilyCompressedAttention": heavily_compressed_attention,
    "DerotatedHCA": heavily_compressed_attention,
    "SlidingWindowAttention": sliding_window_attention,
    "DerotatedSlidingAttention": sliding_window_attention,
    "MHCPre": mhc_pre,
    "MHCPreNorm": mhc_pre_norm,
    "MHCPostPreNorm": mhc_post_pre_norm,
    "MHCPost": mhc_post,
    "MHCHead": mhc_head,
    "TopKRoute": topk_route,
    "HashRoute": hash_route,
    "TopKRouter": topk_router,
    "HashRouter": hash_router,
    "ClampedSwiGLU": swiglu,
    "GroupedExperts": grouped_experts,
    "MixtureOfExperts": mixture_of_experts,
    "EngramHash": engram_hash,
    "EngramLookup": engram_lookup,
    "EngramGateConv": engram_gate_conv,
}


_BETWEEN_ACTIVATIONS = frozenset((
    "CompressedSparseAttention", "DerotatedCSA", "HeavilyCompressedAttention", "DerotatedHCA",
    "SlidingWindowAttention", "DerotatedSlidingAttention", "LightningIndex", "RotaryLightningIndex",
))  # fmt: skip
"""Operators that multiply activations with each other: their kernels are told in which dtype."""


class CUDAKernels:
    """CUDA kernels for the importer.

    Args:
        scheduler: chooses how each cuts its work.
        arithmetic: what activations are rounded to where they are multiplied with each other: ``float32`` or
            ``bfloat16``.
    """

    def __init__(self, scheduler: Scheduler, arithmetic: str = "float32") -> None:
        self.scheduler, self.arithmetic = scheduler, arithmetic

    def storing(self, storage: Storage) -> CUDAKernels:
        """Only a model in float32 is computed in float32: with other weights, rows are rounded for products anyway."""
        return CUDAKernels(self.scheduler, "float32" if storage.products == "float32" else "bfloat16")

    def custom(self, op: CustomOp, inputs: Sequence[TensorSpec], attributes: Attributes) -> Kernel:
        if op.name not in _FACTORIES:
            raise UnsupportedError(f"operator {op.name}: no CUDA kernel")
        named = dict(zip(op.inputs, inputs, strict=True))
        sizes = SIZES[op.name](named, attributes)
        if op.name == "MixtureOfExperts":
            sizes += (named["shared_gate_up"].dtype,)
        if op.name in _BETWEEN_ACTIVATIONS:
            sizes += (self.arithmetic,)
        return self.scheduler.scheduled(Kernel(_FACTORIES[op.name], sizes))

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
