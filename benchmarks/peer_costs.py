"""What a step must read and a prompt must compute, whoever does it: the same count for every peer.

Counted from the model's sizes: weights once, of expert stacks and tables what a token uses, of caches the rows it looks
at. Activations are not counted: a decode step keeps them in the processor's caches.
"""

from __future__ import annotations

from functools import cache

from v4c.frontend.config import ModelConfig
from v4c.frontend.estimate import flops_per_token
from v4c.frontend.names import TensorInfo, tensor_specs


def step_bytes(config: ModelConfig, matrix_bytes: float, cache_bytes: int, context: int) -> float:
    """Bytes that decoding one token behind `context` others must read.

    Args:
        config: the model.
        matrix_bytes: of one weight of a matrix that is multiplied, its share of the scales included.
        cache_bytes: of one cached number.
        context: tokens before this one.
    """
    weights = sum(_read(config, name, info, matrix_bytes) for name, info in tensor_specs(config).items())
    return weights + cache_bytes * _cached_numbers(config, context)


def _read(config: ModelConfig, name: str, info: TensorInfo, matrix_bytes: float) -> float:
    """Bytes of one tensor that one token needs; routers and everything but matrices are float32 in every peer."""
    chosen = config.num_experts_per_tok / config.n_routed_experts
    if name.endswith("embed_tokens.weight"):
        return matrix_bytes * info.shape[1]
    if name.endswith("tid2eid"):
        return 4.0 * info.shape[1]
    if name.endswith("mlp.gate.weight"):
        # With experts from a table, only their rows of the router are needed, for the weights.
        return 4.0 * info.size * (chosen if config.mlp_types[int(name.split(".")[2])] == "hash" else 1.0)
    if info.kind == "fp32":
        return 4.0 * info.size
    return matrix_bytes * info.size * (chosen if "mlp.experts." in name else 1.0)


def _cached_numbers(config: ModelConfig, context: int) -> int:
    """Numbers in the cached rows that a token looks at."""
    numbers = 0
    for kind in config.attention_types:
        rows = min(context, config.sliding_window)
        if kind == "csa":
            ready = context // config.csa_ratio
            rows += min(ready, config.index_topk)
            numbers += ready * config.index_head_dim
        elif kind == "hca":
            rows += context // config.hca_ratio
        numbers += rows * config.head_dim
    return numbers


@cache
def prompt_flops(config: ModelConfig, start: int, tokens: int) -> float:
    """Floating-point operations to read `tokens` tokens behind `start` others; logits for the last one only.

    A sum of `frontend.estimate.flops_per_token`: products and attention, two operations per multiply-add, every query
    with the keys it sees.
    """
    head = 2 * config.vocab_size * config.hidden_size
    return float(sum(flops_per_token(config, p) for p in range(start, start + tokens)) - (tokens - 1) * head)


def resident_bytes(config: ModelConfig, matrix_bytes: float) -> float:
    """Bytes of all weights in memory."""
    return sum(
        info.size * (matrix_bytes if info.kind == "weight" else 4 if info.kind == "fp32" else 8)
        for info in tensor_specs(config).values()
    )
