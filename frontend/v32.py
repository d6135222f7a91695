"""DeepSeek-V3.2, which V4 is compared with, and the comparison: FLOPs of a token and bytes of the cache at one context.

FLOPs are given as counted and in FP8 equivalents, the measure of the V4 paper (arXiv 2606.19348, section 1). The paper
does not list what counts how; here an operation costs what its operands' width says, which reproduces its figures: FP8
once, bfloat16 twice, float32 four times, FP4 by FP4 half. FP4 weights that meet FP8 activations count as FP8. Sizes of
V3.2: its published ``config.json``. The formulas are in docs/cost.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from .config import ModelConfig
from .estimate import cache_bytes_per_token, is_table
from .names import tensor_specs
from .native_layout import is_expert_stack, native_format

COST = {"f32": 4.0, "bf16": 2.0, "fp8": 1.0, "fp4": 1.0}
"""FP8 equivalents of a multiplication by a matrix stored so; routed experts are FP4 by FP8."""
_ATTENTION_COST = COST["bf16"]
_FP4_BY_FP4 = 0.5


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one token, two per multiply-accumulate.

    Attributes:
        counted: each as one.
        fp8: in FP8 equivalents.
    """

    counted: float
    fp8: float

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.counted + other.counted, self.fp8 + other.fp8)


def _operations(count: float, cost: float) -> Flops:
    return Flops(count, count * cost)


@dataclass(frozen=True)
class DeepseekV32:
    """Sizes of DeepSeek-V3.2: multi-head latent attention, sparse by an FP8 lightning indexer."""

    layers: int = 61
    dense_layers: int = 3
    hidden: int = 7168
    vocab: int = 129280
    heads: int = 128
    q_lora: int = 1536
    kv_lora: int = 512
    nope_dim: int = 128
    rope_dim: int = 64
    value_dim: int = 128
    experts: int = 256
    top_k: int = 8
    width: int = 2048
    dense_width: int = 18432
    index_heads: int = 64
    index_dim: int = 128
    index_topk: int = 2048

    def fp8_matrices(self) -> int:
        """Entries of the FP8 matrices that a token is multiplied with."""
        queries = self.hidden * self.q_lora + self.q_lora * self.heads * (self.nope_dim + self.rope_dim)
        latent = self.hidden * (self.kv_lora + self.rope_dim)
        absorbed = self.kv_lora * self.heads * (self.nope_dim + self.value_dim)
        output = self.heads * self.value_dim * self.hidden
        index = self.q_lora * self.index_heads * self.index_dim + self.hidden * self.index_dim
        expert = 3 * self.hidden * self.width
        dense = 3 * self.hidden * self.dense_width
        attention = queries + latent + absorbed + output + index
        sparse_layers = self.layers - self.dense_layers
        return self.layers * attention + self.dense_layers * dense + sparse_layers * (self.top_k + 1) * expert

    def bf16_matrices(self) -> int:
        """Entries of the bfloat16 matrices: output projection, routers, the indexer's head weights."""
        routers = (self.layers - self.dense_layers) * self.experts * self.hidden
        return self.vocab * self.hidden + routers + self.layers * self.hidden * self.index_heads

    def flops_per_token(self, context: int) -> Flops:
        """To decode one token at position `context`: matrices, the indexer over all keys, attention over the best.

        In the absorbed form a key costs each head ``kv_lora + rope_dim`` products for its score and ``kv_lora`` for the
        sum.
        """
        tokens = context + 1
        per_key = 2 * self.heads * (2 * self.kv_lora + self.rope_dim)
        index = 2 * self.index_heads * self.index_dim * tokens
        matrices = _operations(2 * self.fp8_matrices(), COST["fp8"]) + _operations(
            2 * self.bf16_matrices(), COST["bf16"]
        )
        attention = self.layers * per_key * min(tokens, self.index_topk)
        return matrices + _operations(attention, _ATTENTION_COST) + _operations(self.layers * index, COST["fp8"])

    def cache_bytes_per_token(self) -> int:
        """As deployed: a row of 512 FP8 values, 4 float32 scales and 64 bfloat16 rotary dims (656 B), an index row of
        128 FP8 values and a float32 scale (132 B)."""
        row = self.kv_lora + 4 * (self.kv_lora // 128) + 2 * self.rope_dim
        return self.layers * (row + self.index_dim + 4)


V32 = DeepseekV32()


def v4_flops_per_token(config: ModelConfig, context: int) -> Flops:
    """As `estimate.flops_per_token`, with FP8 equivalents for the published formats.

    Attention is bfloat16; the lightning indexer multiplies FP4 by FP4.
    """
    total = Flops(0, 0)
    for name, info in tensor_specs(config).items():
        if (info.kind == "weight" or name.endswith("fn")) and not is_table(name):
            used = (
                info.size * config.num_experts_per_tok // config.n_routed_experts
                if is_expert_stack(name)
                else info.size
            )
            total += _operations(2 * used, COST[native_format(name, info)])
    per_key = 4 * config.num_attention_heads * config.head_dim
    for layer, kind in enumerate(config.attention_types):
        ready = (context + 1) // config.ratio(layer) if config.ratio(layer) else 0
        keys = min(context + 1, config.sliding_window) + min(ready, config.index_topk if kind == "csa" else ready)
        total += _operations(per_key * keys, _ATTENTION_COST)
        if kind == "csa":
            total += _operations(2 * config.index_n_heads * config.index_head_dim * ready, _FP4_BY_FP4)
    return total


def against_v32(config: ModelConfig, context: int = 2**20) -> dict[str, float]:
    """Shares of what V3.2 needs when the next token follows `context` others.

    Returns:
        ``context``, ``flops`` (FP8 equivalents), ``flops_counted`` and ``cache``.
    """
    own, other = v4_flops_per_token(config, context - 1), V32.flops_per_token(context - 1)
    cache = cache_bytes_per_token(config)["fp8"] / V32.cache_bytes_per_token()
    return {
        "context": context,
        "flops": own.fp8 / other.fp8,
        "flops_counted": own.counted / other.counted,
        "cache": cache,
    }
