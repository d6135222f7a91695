"""The operators of ONNX domain ``v4c``, one module each; importing this package declares them all."""

from importlib import import_module

from .base import DOMAIN, OPS, OPSET_VERSION, CustomOp, TensorSpec

MODULES = (
    "trailing_rope",
    "mhc_pre",
    "mhc_post",
    "mhc_head",
    "kv_compress",
    "lightning_index",
    "csa_attention",
    "hca_attention",
    "sliding_attention",
    "engram_hash",
    "engram_lookup",
    "engram_gate_conv",
    "topk_route",
    "hash_route",
    "grouped_experts",
    "clamped_swiglu",
    # What passes put in the place of several of the above.
    "mhc_pre_norm",
    "mhc_post_pre_norm",
    "rotary_query_kv",
    "derotated_attention",
    "rotary_lightning_index",
    "kv_compress_pair",
    "rms_norm_linear",
    "topk_router",
    "hash_router",
    "mixture_of_experts",
)
"""The modules that declare an op; a new op is one more name."""

for _module in MODULES:
    import_module(f"{__name__}.{_module}")

__all__ = ["DOMAIN", "OPS", "OPSET_VERSION", "CustomOp", "TensorSpec"]
