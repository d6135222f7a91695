"""Which CPU kernel stands for which op: the importer's `Kernels` protocol, answered from the shapes of the inputs.

Static sizes are those of every target (`v4c.targets.op_sizes`); how a kernel's work is cut follows from these and the
x86-64 level (`scheduling`); everything else about a kernel is in `kernels/`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from v4c.custom_ops import CustomOp, TensorSpec
from v4c.errors import UnsupportedError
from v4c.passes.relax.kernels import Kernel
from v4c.passes.relax.layouts import WeightSpec

from ..op_sizes import SIZES, Attributes, Inputs, Sizes, size
from ..tuning_database import TuningDatabase
from . import packing
from .kernels.attention import compressed_sparse_attention, heavily_compressed_attention, sliding_window_attention
from .kernels.compress import kv_compress, kv_compress_pair
from .kernels.engram import engram_gate_conv, engram_hash, engram_lookup
from .kernels.experts import grouped_experts, mixture_of_experts
from .kernels.grouped_linear import grouped_linear
from .kernels.index import lightning_index
from .kernels.linear import merged_linear
from .kernels.linear_unpacked import linear_unpacked
from .kernels.mhc import mhc_head, mhc_post, mhc_pre
from .kernels.mhc_fused import mhc_post_pre_norm, mhc_pre_norm
from .kernels.rms_norm import rms_norm
from .kernels.rope import trailing_rope
from .kernels.rotary_query_kv import rotary_query_kv
from .kernels.routers import hash_router, topk_router
from .kernels.routes import hash_route, topk_route
from .kernels.row_formats import row_format
from .kernels.swiglu import swiglu
from .levels import dots
from .scheduling import scheduler

_added: dict[str, Callable[[Inputs, Attributes], Kernel]] = {}

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


def _format(cache: str, width: tuple[str, int]) -> Sizes:
    """Format of a cache's rows, which are as wide as a dimension of another input."""
    return lambda i, a: (row_format(size(i, *width), size(i, cache, 2), i[cache].dtype),)


_ROW_FORMATS: dict[str, Sizes] = {
    **dict.fromkeys(
        (
            "CompressedSparseAttention", "DerotatedCSA", "HeavilyCompressedAttention", "DerotatedHCA",
            "SlidingWindowAttention", "DerotatedSlidingAttention",
        ),
        _format("window", ("q", 3)),
    ),
    **dict.fromkeys(("LightningIndex", "RotaryLightningIndex"), _format("index_rows", ("q", 3))),
    "KVCompress": _format("rows", ("norm", 0)),
    "KVCompressPair": lambda i, a: (
        *_format("rows", ("norm", 0))(i, a), *_format("index_rows", ("index_norm", 0))(i, a)
    ),
}  # fmt: skip
"""What factories of kernels that read or write caches take beyond the sizes."""


def add_kernel(op: str, choose: Callable[[Inputs, Attributes], Kernel]) -> None:
    """Have CPU code call a kernel for an operator that v4c has none for.

    Args:
        op: ONNX name of the operator.
        choose: the kernel for inputs (specs by name; weights as in the graph) and attributes.

    Raises:
        UnsupportedError: the operator has a kernel.
    """
    if op in _FACTORIES or op in _added:
        raise UnsupportedError(f"operator {op}: expected one without a CPU kernel, found one that has it")
    _added[op] = choose


class CPUKernels:
    """CPU kernels for the importer.

    Args:
        level: x86-64 level of the code, or ``generic``.
        tuning: schedules to prefer to those that come with v4c.
    """

    def __init__(self, level: str = "x86-64-v4", tuning: TuningDatabase | None = None) -> None:
        self._level = level
        self.scheduler = scheduler(level, tuning)

    def custom(self, op: CustomOp, inputs: Sequence[TensorSpec], attributes: Attributes) -> Kernel:
        named = dict(zip(op.inputs, inputs, strict=True))
        if op.name in _added:
            return self.scheduler.scheduled(_added[op.name](named, attributes))
        if op.name not in _FACTORIES:
            raise UnsupportedError(f"operator {op.name}: no CPU kernel")
        arguments = SIZES[op.name](named, attributes)
        if op.name in _ROW_FORMATS:
            arguments += _ROW_FORMATS[op.name](named, attributes)
        elif op.name == "GroupedExperts":
            arguments += (dots(self._level, named["gate_up"].dtype),)
        elif op.name == "MixtureOfExperts":
            arguments += (dots(self._level, named["gate_up"].dtype), named["shared_gate_up"].dtype)
        return self.scheduler.scheduled(Kernel(_FACTORIES[op.name], arguments))

    def linear(self, sizes: tuple[int, ...], k: int, dtype: str, norm_eps: float | None) -> Kernel:
        return self.scheduler.scheduled(Kernel(merged_linear, (sizes, k, dtype, norm_eps, dots(self._level, dtype))))

    def linear_unpacked(self, n: int, k: int, dtype: str) -> Kernel:
        return self.scheduler.scheduled(Kernel(linear_unpacked, (n, k, dtype)))

    def grouped_linear(self, groups: int, n: int, k: int, dtype: str) -> Kernel:
        return self.scheduler.scheduled(Kernel(grouped_linear, (groups, n, k, dtype, dots(self._level, dtype))))

    def rms_norm(self, width: int, eps: float, weighted: bool) -> Kernel:
        return Kernel(rms_norm, (width, eps, weighted))

    def packed(self, weight: WeightSpec) -> TensorSpec:
        return packing.packed(weight)
