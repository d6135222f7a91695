"""The sizes of the trained model, and of its ablations."""

from __future__ import annotations

from dataclasses import dataclass, replace

from v4c.frontend.config import EngramConfig, ModelConfig, YarnScaling

VOCABULARY = 2048
BOS, EOS, PAD = 0, 1, 2

# v4-nano's schedule and head sizes. The window is a quarter of v4-nano's and the indexer keeps 32 rows, so that at a
# thousand tokens most of the text can only be reached through compressed rows, and the indexer has to choose.
NANO = ModelConfig(
    vocab_size=VOCABULARY,
    hidden_size=128,
    num_hidden_layers=6,
    num_attention_heads=8,
    head_dim=64,
    qk_rope_head_dim=16,
    q_lora_rank=64,
    o_groups=2,
    o_lora_rank=64,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_shared_experts=1,
    moe_intermediate_size=64,
    routed_scaling_factor=1.5,
    swiglu_limit=10.0,
    attention_types=("sliding", "csa", "hca", "csa", "hca", "csa"),
    csa_ratio=4,
    hca_ratio=128,
    mlp_types=("hash", "hash", "topk", "topk", "topk", "topk"),
    sliding_window=32,
    index_n_heads=16,
    index_head_dim=32,
    index_topk=32,
    hc_mult=4,
    hc_sinkhorn_iters=20,
    hc_eps=1e-6,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    compress_rope_theta=160000.0,
    yarn=YarnScaling(factor=16.0, original_max_position_embeddings=4096),
    max_position_embeddings=65536,
    num_nextn_predict_layers=1,
    bos_token_id=BOS,
    eos_token_ids=(EOS,),
    pad_token_id=PAD,
    engram=EngramConfig(layer_ids=(1, 3), heads_per_ngram=2, embed_dim=32, table_rows=2048, pad_id=PAD),
)


@dataclass(frozen=True)
class Variant:
    """A model to train. `plain_residual` replaces hyper-connections by one residual stream: ``x + f(norm(x))``."""

    config: ModelConfig
    plain_residual: bool = False


def _compressed(kind: str) -> ModelConfig:
    types = tuple("sliding" if found == "sliding" else kind for found in NANO.attention_types)
    return replace(NANO, attention_types=types)


VARIANTS: dict[str, Variant] = {
    "full": Variant(NANO),
    "no-engram": Variant(replace(NANO, engram=None)),
    "no-mhc": Variant(replace(NANO, hc_mult=1), plain_residual=True),
    "hca-only": Variant(_compressed("hca")),
    "csa-only": Variant(_compressed("csa")),
}
"""The model and its ablations, by the name that ``--variant`` takes."""
