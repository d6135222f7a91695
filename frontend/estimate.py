"""How large a model is and what a token costs, from its config alone: parameters, weight bytes, cache bytes, FLOPs.

These are the figures ``v4c presets`` and ``v4c inspect`` print. They reproduce the published ones for V4-Flash and
V4-Pro.
"""

from __future__ import annotations

from typing import Literal

from .config import ModelConfig
from .names import mtp_specs, tensor_specs
from .native_layout import is_expert_stack, native_bytes

WeightDtype = Literal["native", "f32", "bf16", "f16"]
CacheDtype = Literal["f32", "bf16", "fp8"]

FP4_GROUP = 32
"""An FP4 index row has one e8m0 scale byte per 32 columns."""
FP8_ROW_GROUP = 64
"""A deployed FP8 cache row has one scale byte per 64 dims, padded to `_FP8_ROW_ALIGNMENT` of them."""
_FP8_ROW_ALIGNMENT = 8


def is_table(name: str) -> bool:
    """Whether the tensor is read by row, not multiplied with."""
    return name.endswith(("embed_tokens.weight", "engram.embedding.weight"))


def parameters(config: ModelConfig) -> int:
    """All trained numbers: every float tensor, embeddings included; id tables and MTP layers not."""
    return sum(info.size for info in tensor_specs(config).values() if info.kind != "int64")


def active_parameters(config: ModelConfig) -> int:
    """What one token's forward pass uses of `parameters`.

    ``K / E`` of the routed experts, all of attention, shared expert, router, hyper-connections and head; of the
    embedding (and Engram) tables only the rows that are read.
    """
    active = config.hidden_size
    if config.engram is not None:
        active += len(config.engram.layer_ids) * config.engram.embedding_width
    for name, info in tensor_specs(config).items():
        if info.kind == "int64" or is_table(name):
            continue
        active += (
            info.size * config.num_experts_per_tok // config.n_routed_experts if is_expert_stack(name) else info.size
        )
    return active


def weight_bytes(config: ModelConfig, dtype: WeightDtype = "native") -> int:
    """Bytes of all weights, id tables included, MTP layers not.

    ``"native"`` is the published mix: routed experts FP4 (``n / 2 + n / 32``), the other large matrices of attention
    and of the shared expert FP8 (``n`` and a byte per 128 x 128 block), embeddings, head, compressors, routers and
    norms bf16, hyper-connections, sinks and biases fp32, `tid2eid` int64. Any other `dtype` holds for the weight
    matrices, with norms, hyper-connections, sinks and biases in fp32.
    """
    each = {"f32": 4, "bf16": 2, "f16": 2}
    total = 0
    for name, info in tensor_specs(config).items():
        if info.kind == "int64":
            total += 8 * info.size
        elif dtype == "native":
            total += native_bytes(name, info)
        else:
            total += info.size * (4 if info.kind == "fp32" else each[dtype])
    return total


def mtp_weight_bytes(config: ModelConfig) -> int:
    """Bytes of the published MTP layers, which v4c leaves out: published files hold `weight_bytes` plus this."""
    return sum(native_bytes(name, info) for name, info in mtp_specs(config).items())


def row_bytes(config: ModelConfig, kv: CacheDtype) -> tuple[int, int]:
    """Bytes of one cached KV row and of one indexer row.

    FP8 rows hold the rotated dims in bf16 and the others in e4m3 with a scale byte per 64, padded to a multiple of 8
    scales (448 + 64 * 2 + 8 = 584 B); their index rows are FP4 with a scale byte per 32 (64 + 4 = 68 B).
    """
    width, index_width = config.head_dim, config.index_head_dim
    if kv == "fp8":
        plain = width - config.qk_rope_head_dim
        scales = -(-plain // (FP8_ROW_GROUP * _FP8_ROW_ALIGNMENT)) * _FP8_ROW_ALIGNMENT
        return plain + 2 * config.qk_rope_head_dim + scales, -(-index_width // 2) + -(-index_width // FP4_GROUP)
    each = 4 if kv == "f32" else 2
    return each * width, each * index_width


def cache_bytes_per_token(config: ModelConfig) -> dict[CacheDtype, int]:
    """Bytes the cache grows by per token, on average and rounded, for each cache format.

    Sum over CSA layers of ``(kv row + index row) / csa_ratio`` and over HCA layers of ``kv row / hca_ratio``. Windows
    and compressor states do not grow.
    """
    csa, hca = len(config.layers_of("csa")), len(config.layers_of("hca"))
    formats: tuple[CacheDtype, ...] = ("f32", "bf16", "fp8")
    result: dict[CacheDtype, int] = {}
    for kv in formats:
        row, index_row = row_bytes(config, kv)
        result[kv] = round(csa * (row + index_row) / config.csa_ratio + hca * row / config.hca_ratio)
    return result


def cache_bytes(config: ModelConfig, tokens: int, kv: CacheDtype) -> int:
    """Bytes of one sequence's caches with room for `tokens` tokens.

    Per layer: the window's W rows; on compressed layers ``ceil(tokens / ratio)`` rows, with an index row each on CSA
    layers, and the compressor rings of raw projections in fp32: kv and gate for ``m`` tokens of C on HCA layers, for
    ``2m`` tokens of ``2C`` and (indexer) ``2I`` on CSA layers. Engram layers add their id ring (int64) and
    convolution ring (fp32).
    """
    row, index_row = row_bytes(config, kv)
    width, index_width = config.head_dim, config.index_head_dim
    total = 0
    for layer, kind in enumerate(config.attention_types):
        total += config.sliding_window * row
        if kind == "csa":
            rows = -(-tokens // config.csa_ratio)
            total += rows * (row + index_row) + 4 * 2 * (2 * config.csa_ratio) * 2 * (width + index_width)
        elif kind == "hca":
            total += -(-tokens // config.hca_ratio) * row + 4 * 2 * config.hca_ratio * width
        if config.engram is not None and config.has_engram(layer):
            taps = (config.engram.kernel_size - 1) * config.engram.dilation
            total += 8 * (config.engram.max_ngram - 1) + 4 * taps * config.hc_mult * config.hidden_size
    return total


def flops_per_token(config: ModelConfig, context: int) -> int:
    """Multiplications and additions to decode one token at position `context`, two per multiply-accumulate.

    Matrices: 2 per active parameter (embedding rows are read, not multiplied). Attention: ``4 * heads * head_dim``
    per key, for scores and for the weighted sum. Keys: the window; every compressed row on HCA layers; the
    `index_topk` best on CSA layers, where finding them costs ``2 * index_heads * index_head_dim`` per compressed row.
    """
    flops = 2 * sum(
        info.size * config.num_experts_per_tok // config.n_routed_experts if is_expert_stack(name) else info.size
        for name, info in tensor_specs(config).items()
        if (info.kind == "weight" or name.endswith("fn")) and not is_table(name)
    )
    per_key = 4 * config.num_attention_heads * config.head_dim
    for kind in config.attention_types:
        keys = min(context + 1, config.sliding_window)
        if kind == "csa":
            ready = (context + 1) // config.csa_ratio
            keys += min(ready, config.index_topk)
            flops += 2 * config.index_n_heads * config.index_head_dim * ready
        elif kind == "hca":
            keys += (context + 1) // config.hca_ratio
        flops += per_key * keys
    return flops
