"""Random small V4 models for parity tests: a `transformers` model with every parameter randomised, and random chunks.

Configurations differ in everything a kernel or a graph depends on. Ratios, windows and top-k are small so that a few
hundred tokens cross many window ends, and there are at least 16 indexer heads, or ties make the choice arbitrary.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from v4c.frontend.config import ModelConfig

SLIDING, CSA, HCA = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"


def random_hf_config(seed: int, published_ratios: bool = False) -> DeepseekV4Config:
    """A random configuration; the first layers cover every attention type and both routers."""
    rng = np.random.default_rng(seed)
    pick = rng.choice
    layers = int(rng.integers(4, 6))
    kinds = [SLIDING, CSA, HCA, CSA] + [str(pick([SLIDING, CSA, HCA])) for _ in range(layers - 4)]
    rng.shuffle(kinds)
    hashed = int(rng.integers(1, 3))
    groups = int(pick([1, 2, 4]))
    head_dim, rope_dim = int(pick([24, 32, 64])), int(pick([8, 16]))
    experts = int(pick([6, 8, 16]))
    yarn = {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 32, "beta_slow": 1,
        "attention_factor": 1.0,
    }  # fmt: skip
    return DeepseekV4Config(
        vocab_size=int(pick([199, 320])),
        hidden_size=int(pick([48, 64, 80])),
        moe_intermediate_size=int(pick([24, 32, 48])),
        num_hidden_layers=layers,
        num_attention_heads=groups * int(pick([1, 2, 4])),
        head_dim=head_dim,
        q_lora_rank=int(pick([24, 40])),
        num_experts_per_tok=int(rng.integers(2, 5)),
        n_routed_experts=experts,
        layer_types=kinds,
        mlp_layer_types=["hash_moe"] * hashed + ["moe"] * (layers - hashed),
        compress_rates={CSA: 4, HCA: 128 if published_ratios else int(pick([8, 16, 32]))},
        sliding_window=128 if published_ratios else int(pick([8, 16, 31])),
        o_groups=groups,
        o_lora_rank=int(pick([16, 24])),
        index_n_heads=int(pick([16, 20, 32])),
        index_head_dim=int(pick([16, 32])),
        index_topk=int(pick([8, 16, 512])),
        hc_mult=int(pick([2, 4])),
        partial_rotary_factor=rope_dim / head_dim,
        max_position_embeddings=4096,
        rope_parameters=yarn if rng.random() < 0.7 else None,
        routed_scaling_factor=float(pick([1.0, 1.5, 2.5])),
        swiglu_limit=float(pick([1.0, 10.0])),
        pad_token_id=None,
    )


@torch.no_grad()
def random_hf_model(config: DeepseekV4Config, seed: int) -> DeepseekV4ForCausalLM:
    """The `transformers` model with every parameter and buffer random, at scales where each one shows in the logits."""
    torch.manual_seed(seed)
    model = DeepseekV4ForCausalLM(config).eval()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point() or "inv_freq" in name:
            continue
        noise = torch.randn(tensor.shape)
        if "norm" in name:
            tensor.copy_(1 + 0.2 * noise)
        elif name.endswith("scale"):
            tensor.copy_(0.5 + torch.rand(tensor.shape))
        elif name.endswith("e_score_correction_bias"):
            tensor.copy_(0.2 * noise)
        elif name.endswith(("sinks", "position_bias", "base")) or "embed" in name:
            tensor.copy_(noise)
        elif name.endswith("fn") or "lm_head" in name:
            tensor.copy_(noise / math.sqrt(tensor.shape[-1]))
        else:
            tensor.copy_(1.5 * noise / math.sqrt(tensor.shape[-1]))
    for name, table in model.named_buffers():
        if name.endswith("tid2eid"):
            rows = [torch.randperm(config.n_routed_experts)[: config.num_experts_per_tok] for _ in range(len(table))]
            table.copy_(torch.stack(rows))
    return model


@dataclass
class StateDictSource:
    """Weights of a live `transformers` model, as the compile driver and the torch model take them."""

    config: ModelConfig
    state: dict[str, torch.Tensor]

    @classmethod
    def of(cls, model: Any) -> StateDictSource:
        return cls(ModelConfig.from_dict(json.loads(model.config.to_json_string())), model.state_dict())

    def names(self) -> list[str]:
        return list(self.state)

    def load(self, name: str, dtype: str | None = None) -> np.ndarray:
        return self.state[name].detach().numpy()


def random_chunks(rng: np.random.Generator, total: int, marks: tuple[int, ...] = (4, 16, 128)) -> list[int]:
    """Chunk lengths that add up to `total`, many of them ending within a token of a multiple of one of `marks`."""
    chunks, position = [], 0
    while position < total:
        mark = int(rng.choice(marks))
        end = (position // mark + int(rng.integers(1, 3))) * mark + int(rng.integers(-1, 2))
        end = min(total, max(position + 1, end))
        chunks.append(end - position)
        position = end
    return chunks
