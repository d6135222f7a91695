"""Which CPU kernel stands for which op: the importer's `Kernels` protocol, answered from the shapes of the inputs.

One line per op picks the static sizes a kernel factory needs; how its work is cut follows from these and the x86-64
level (`scheduling`); everything else about a kernel is in `kernels/`.
"""

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
from .levels import has_vnni
from .scheduling import Scheduler
from .tuning_database import TuningDatabase

Inputs = Mapping[str, TensorSpec]
Attributes = Mapping[str, Any]


def _size(inputs: Inputs, name: str, axis: int) -> int:
    """A static dimension of an input."""
    return int(inputs[name].shape[axis])


def _attention_sizes(i: Inputs) -> tuple[int, int, int]:
    """Heads, head width and window of an attention op."""
    return _size(i, "q", 2), _size(i, "q", 3), _size(i, "window", 1)


def _rotary(i: Inputs) -> int:
    """Dims that are rotated."""
    return 2 * _size(i, "inv_freq", 0)


def _format(i: Inputs, cache: str, width: int) -> str:
    """Format of a cache's rows of `width` dims."""
    return row_format(width, _size(i, cache, 2), i[cache].dtype)


def _compressed_widths(i: Inputs, prefix: str = "") -> tuple[int, int]:
    """Widths of a compressor's projections and of its rows."""
    return _size(i, f"{prefix}kv", 2), _size(i, f"{prefix}norm", 0)


def _turned(i: Inputs) -> tuple[int, str]:
    """Dims of an attention's outputs that are rotated back, and the format of its caches."""
    return (_rotary(i) if "inv_freq" in i else 0), _format(i, "window", _size(i, "q", 3))


def _csa_sizes(i: Inputs, a: Attributes) -> tuple[Any, ...]:
    return (*_attention_sizes(i), _size(i, "indices", 2), a["scale"], *_turned(i))


def _hca_sizes(i: Inputs, a: Attributes) -> tuple[Any, ...]:
    return (*_attention_sizes(i), a["ratio"], a["scale"], *_turned(i))


def _sliding_sizes(i: Inputs, a: Attributes) -> tuple[Any, ...]:
    return (*_attention_sizes(i), a["scale"], *_turned(i))


def _index_sizes(i: Inputs, a: Attributes) -> tuple[Any, ...]:
    width = _size(i, "q", 3)
    rotary = _rotary(i) if "inv_freq" in i else 0
    return _size(i, "q", 2), width, a["ratio"], a["top_k"], rotary, _format(i, "index_rows", width)


def _expert_sizes(i: Inputs, a: Attributes) -> tuple[Any, ...]:
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
        kv_compress,
        (*_compressed_widths(i), _rotary(i), a["ratio"], a["eps"], _format(i, "rows", _size(i, "norm", 0))),
    ),
    "KVCompressPair": lambda i, a: Kernel(
        kv_compress_pair,
        (
            *_compressed_widths(i), *_compressed_widths(i, "index_"), _rotary(i), a["ratio"], a["eps"],
            _format(i, "rows", _size(i, "norm", 0)), _format(i, "index_rows", _size(i, "index_norm", 0)),
        ),
    ),
    "LightningIndex": lambda i, a: Kernel(lightning_index, _index_sizes(i, a)),
    "RotaryLightningIndex": lambda i, a: Kernel(lightning_index, _index_sizes(i, a)),
    "CompressedSparseAttention": lambda i, a: Kernel(compressed_sparse_attention, _csa_sizes(i, a)),
    "DerotatedCSA": lambda i, a: Kernel(compressed_sparse_attention, _csa_sizes(i, a)),
    "HeavilyCompressedAttention": lambda i, a: Kernel(heavily_compressed_attention, _hca_sizes(i, a)),
    "DerotatedHCA": lambda i, a: Kernel(heavily_compressed_attention, _hca_sizes(i, a)),
    "SlidingWindowAttention": lambda i, a: Kernel(sliding_window_attention, _sliding_sizes(i, a)),
    "DerotatedSlidingAttention": lambda i, a: Kernel(sliding_window_attention, _sliding_sizes(i, a)),
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


_EXPERTS: dict[str, Callable[[Inputs, Attributes], Kernel]] = {
    "GroupedExperts": lambda i, a: Kernel(grouped_experts, _expert_sizes(i, a)),
    "MixtureOfExperts": lambda i, a: Kernel(
        mixture_of_experts, (*_expert_sizes(i, a), _size(i, "shared_down", 1), False, i["shared_gate_up"].dtype)
    ),
}  # fmt: skip
"""Kernels that differ with AVX512-VNNI."""

_VNNI = {grouped_experts: 6, mixture_of_experts: 7}
"""Which argument says whether the target has it."""


def add_kernel(op: str, choose: Callable[[Inputs, Attributes], Kernel]) -> None:
    """Have CPU code call a kernel for an operator that v4c has none for.

    Args:
        op: ONNX name of the operator.
        choose: the kernel for inputs (specs by name; weights as in the graph) and attributes.

    Raises:
        UnsupportedError: the operator has a kernel.
    """
    if op in _CUSTOM or op in _EXPERTS:
        raise UnsupportedError(f"operator {op}: expected one without a CPU kernel, found one that has it")
    _CUSTOM[op] = choose


class CPUKernels:
    """CPU kernels for the importer.

    Args:
        level: x86-64 level of the code, or ``generic``.
        tuning: schedules to prefer to those that come with v4c.
    """

    def __init__(self, level: str = "x86-64-v4", tuning: TuningDatabase | None = None) -> None:
        self.vnni = has_vnni(level)
        self.scheduler = Scheduler(level, tuning)

    def custom(self, op: CustomOp, inputs: Sequence[TensorSpec], attributes: Attributes) -> Kernel:
        named = dict(zip(op.inputs, inputs, strict=True))
        if op.name in _EXPERTS:
            kernel = _EXPERTS[op.name](named, attributes)
            at = _VNNI[kernel.factory]
            return self.scheduler.scheduled(
                Kernel(kernel.factory, (*kernel.arguments[:at], self.vnni, *kernel.arguments[at + 1 :]))
            )
        if op.name not in _CUSTOM:
            raise UnsupportedError(f"operator {op.name}: no CPU kernel")
        return self.scheduler.scheduled(_CUSTOM[op.name](named, attributes))

    def linear(self, sizes: tuple[int, ...], k: int, dtype: str, norm_eps: float | None) -> Kernel:
        return self.scheduler.scheduled(Kernel(merged_linear, (sizes, k, dtype, norm_eps, self.vnni)))

    def linear_unpacked(self, n: int, k: int, dtype: str) -> Kernel:
        return self.scheduler.scheduled(Kernel(linear_unpacked, (n, k, dtype)))

    def grouped_linear(self, groups: int, n: int, k: int, dtype: str) -> Kernel:
        return self.scheduler.scheduled(Kernel(grouped_linear, (groups, n, k, dtype, self.vnni)))

    def rms_norm(self, width: int, eps: float, weighted: bool) -> Kernel:
        return Kernel(rms_norm, (width, eps, weighted))

    def packed(self, weight: WeightSpec) -> TensorSpec:
        return packing.packed(weight)
