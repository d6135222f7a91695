"""What each custom op of a traced layer becomes before torch-mlir sees it: torch functions that lower to linalg.

Most references of `v4c.custom_ops` have loops or shapes that depend on data (`nonzero`, experts in use, rows that are
ready), which linalg cannot say; those have a function here that masks and counts instead. The others stand as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from v4c.custom_ops import OPS

from . import attention, engram, experts, rotation, state

_REPLACED: dict[str, Callable[..., Any]] = {
    "TrailingRope": rotation.trailing_rope,
    "KVCompress": state.compressed,
    "LightningIndex": attention.lightning_index,
    "CompressedSparseAttention": attention.compressed_sparse,
    "HeavilyCompressedAttention": attention.heavily_compressed,
    "SlidingWindowAttention": attention.sliding,
    "EngramHash": engram.engram_hash,
    "EngramGateConv": engram.engram_gate_conv,
    "TopKRoute": experts.topk_route,
    "GroupedExperts": experts.grouped_experts,
}
_AS_REFERENCE = ("MHCPre", "MHCPost", "MHCHead", "EngramLookup", "HashRoute")

FUNCTIONS: dict[str, Callable[..., Any]] = _REPLACED | {name: OPS[name].reference for name in _AS_REFERENCE}
"""By ONNX name, a function with the signature of the op's reference and, but for the order of chosen rows, its
results."""


def table() -> dict[Any, Callable[..., Any]]:
    """The functions by torch operator, as ``ExportedProgram.run_decompositions`` takes them."""
    return {OPS[name].torch_op: function for name, function in FUNCTIONS.items()}
