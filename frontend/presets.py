"""The sizes v4c knows by name: the published models, two small ones, a slice of V4-Flash, and each with Engram."""

from __future__ import annotations

from dataclasses import replace

from v4c.errors import ConfigError

from .config import EngramConfig, ModelConfig, YarnScaling

_KIND_OF_RATIO = {0: "sliding", 4: "csa", 128: "hca"}


def _attention(ratios: list[int]) -> tuple[str, ...]:
    return tuple(_KIND_OF_RATIO[ratio] for ratio in ratios)


def _mlp(layers: int, hashed: int) -> tuple[str, ...]:
    return ("hash",) * hashed + ("topk",) * (layers - hashed)


_FLASH = ModelConfig(
    vocab_size=129280,
    hidden_size=4096,
    num_hidden_layers=43,
    num_attention_heads=64,
    head_dim=512,
    qk_rope_head_dim=64,
    q_lora_rank=1024,
    o_groups=8,
    o_lora_rank=1024,
    n_routed_experts=256,
    num_experts_per_tok=6,
    n_shared_experts=1,
    moe_intermediate_size=2048,
    routed_scaling_factor=1.5,
    swiglu_limit=10.0,
    attention_types=_attention([0, 0, 4] + [128, 4] * 20),
    csa_ratio=4,
    hca_ratio=128,
    mlp_types=_mlp(43, 3),
    sliding_window=128,
    index_n_heads=64,
    index_head_dim=128,
    index_topk=512,
    hc_mult=4,
    hc_sinkhorn_iters=20,
    hc_eps=1e-6,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    compress_rope_theta=160000.0,
    yarn=YarnScaling(factor=16.0, original_max_position_embeddings=65536),
    max_position_embeddings=1048576,
    num_nextn_predict_layers=1,
    bos_token_id=0,
    eos_token_ids=(1,),
    dtype="bfloat16",
)

_PRO = replace(
    _FLASH,
    hidden_size=7168,
    num_hidden_layers=61,
    num_attention_heads=128,
    q_lora_rank=1536,
    o_groups=16,
    n_routed_experts=384,
    moe_intermediate_size=3072,
    routed_scaling_factor=2.5,
    attention_types=_attention([128, 128, 4] + [128, 4] * 29),
    mlp_types=_mlp(61, 3),
    index_topk=1024,
)

_FLASH_SLICE = replace(
    _FLASH,
    num_hidden_layers=4,
    n_routed_experts=48,
    attention_types=_attention([0, 4, 128, 4]),
    mlp_types=_mlp(4, 1),
    num_nextn_predict_layers=0,
)

_MINI = replace(
    _FLASH,
    vocab_size=32768,
    hidden_size=512,
    num_hidden_layers=8,
    num_attention_heads=16,
    q_lora_rank=256,
    o_groups=4,
    o_lora_rank=256,
    n_routed_experts=32,
    moe_intermediate_size=256,
    attention_types=_attention([0, 0, 4, 128, 4, 128, 4, 128]),
    mlp_types=_mlp(8, 2),
    index_n_heads=16,
    num_nextn_predict_layers=0,
    dtype="float32",
)

# Every kind of layer and router, small enough for a test; 16 indexer heads, for with fewer many scores are exactly 0.
_NANO = replace(
    _MINI,
    vocab_size=4096,
    hidden_size=128,
    num_hidden_layers=6,
    num_attention_heads=8,
    head_dim=64,
    qk_rope_head_dim=16,
    q_lora_rank=64,
    o_groups=2,
    o_lora_rank=64,
    n_routed_experts=16,
    num_experts_per_tok=4,
    moe_intermediate_size=64,
    attention_types=_attention([0, 4, 128, 4, 128, 4]),
    mlp_types=_mlp(6, 2),
    index_head_dim=32,
    index_topk=64,
    yarn=YarnScaling(factor=16.0, original_max_position_embeddings=4096),
    max_position_embeddings=65536,
)


def with_engram(config: ModelConfig, heads_per_ngram: int = 8, embed_dim: int = 0, table_rows: int = 0) -> ModelConfig:
    """`config` with Engram on its second layer and at a third of its depth.

    The defaults follow the paper's proportions (arXiv 2601.07372): some five table rows per token id and head, and
    rows so wide that all heads of one n-gram length together are an eighth of the hidden size.
    """
    engram = EngramConfig(
        layer_ids=(1, max(2, config.num_hidden_layers // 3)),
        heads_per_ngram=heads_per_ngram,
        embed_dim=embed_dim or max(1, config.hidden_size // (8 * heads_per_ngram)),
        table_rows=table_rows or 5 * config.vocab_size,
        pad_id=config.pad_token_id if config.pad_token_id is not None else 2,
    )
    return replace(config, engram=engram)


PRESETS: dict[str, ModelConfig] = {
    "v4-flash": _FLASH,
    "v4-pro": _PRO,
    "v4-mini": _MINI,
    "v4-nano": _NANO,
    "flash-slice": _FLASH_SLICE,
    "v4-flash-engram": with_engram(_FLASH),
    "v4-pro-engram": with_engram(_PRO),
    "v4-mini-engram": with_engram(_MINI),
    "v4-nano-engram": with_engram(_NANO, heads_per_ngram=4, table_rows=4096),
    "flash-slice-engram": with_engram(_FLASH_SLICE),
}
"""Name to config, in the order ``v4c presets`` lists them."""


def preset(name: str) -> ModelConfig:
    """The preset called `name`.

    Raises:
        ConfigError: no such preset; the message lists them.
    """
    if name not in PRESETS:
        raise ConfigError(f"preset: expected one of {', '.join(PRESETS)}, found {name!r}")
    return PRESETS[name]
