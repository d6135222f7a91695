"""The tensor inventory and the upstream mapping, against transformers' state_dict and its conversion rules."""

from __future__ import annotations

import os
import re
from dataclasses import replace

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from v4c.frontend.config import ModelConfig
from v4c.frontend.names import canonical, expert_piece, is_mtp, sources, tensor_specs
from v4c.frontend.presets import PRESETS, preset

torch.set_num_threads(1)


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    layers = draw(st.integers(1, 4))
    small = st.integers(1, 9)
    groups = draw(st.integers(1, 3))
    return replace(
        preset("v4-nano"),
        vocab_size=draw(st.integers(8, 40)),
        hidden_size=draw(st.integers(4, 40)),
        num_hidden_layers=layers,
        num_attention_heads=groups * draw(st.integers(1, 3)),
        head_dim=draw(st.integers(2, 30)),
        qk_rope_head_dim=2,
        q_lora_rank=draw(small),
        o_groups=groups,
        o_lora_rank=draw(small),
        n_routed_experts=draw(st.integers(4, 12)),
        num_experts_per_tok=draw(st.integers(1, 4)),
        moe_intermediate_size=draw(small),
        attention_types=tuple(draw(st.sampled_from(("sliding", "csa", "hca"))) for _ in range(layers)),
        mlp_types=tuple(draw(st.sampled_from(("hash", "topk"))) for _ in range(layers)),
        csa_ratio=draw(small),
        hca_ratio=draw(small),
        index_head_dim=draw(st.integers(2, 20)),
        index_n_heads=draw(small),
        hc_mult=draw(st.integers(1, 5)),
    )


@settings(deadline=None, max_examples=12)
@given(configs())
def test_equals_the_reference_state_dict(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = DeepseekV4ForCausalLM(DeepseekV4Config(**config.to_dict()))
    state = model.state_dict()
    specs = tensor_specs(config)
    assert list(specs) == list(state)
    assert {name: info.shape for name, info in specs.items()} == {name: tuple(t.shape) for name, t in state.items()}
    assert {name for name, info in specs.items() if info.kind == "int64"} == {
        name for name, t in state.items() if t.dtype == torch.int64
    }
    kept = re.compile("|".join(rf"\b{part}\b" for part in model._keep_in_fp32_modules_strict))
    assert {name for name, info in specs.items() if info.kind == "fp32"} == {
        name for name in state if kept.search(name)
    }


def as_transformers_renames(name: str) -> str:
    """An upstream name through transformers' own renaming rules (all but the joining of experts)."""
    for rule in get_checkpoint_conversion_mapping("deepseek_v4"):
        if type(rule).__name__ == "WeightRenaming":
            for pattern, target in zip(rule.source_patterns, rule.target_patterns, strict=True):
                name = re.sub(pattern, target.replace("\\.", "."), name)
    return name if name.startswith("lm_head") else f"model.{name}"


@pytest.mark.parametrize("name", ["v4-nano", "v4-mini"])
def test_sources_follow_the_conversion_mapping(name: str) -> None:
    config = preset(name)
    for ours, info in tensor_specs(config).items():
        source = sources(config, ours)
        if source.join == "copy":
            (piece,) = source.pieces
            assert as_transformers_renames(piece) == ours
            assert canonical(piece) == ours
            continue
        parts = ["w1", "w3"] if source.join == "stack_gate_up" else ["w2"]
        layer = ours.split(".")[2]
        wanted = [f"layers.{layer}.ffn.experts.{e}.{p}.weight" for e in range(info.shape[0]) for p in parts]
        assert list(source.pieces) == wanted


def test_canonical_spellings() -> None:
    kv_norm = "model.layers.3.self_attn.kv_norm.weight"
    for spelling in (
        "layers.3.attn.kv_norm.weight",
        "model.layers.3.attn.norm.weight",
        "model.layers.3.self_attn.norm.weight",
        kv_norm,
    ):
        assert canonical(spelling) == kv_norm
    for spelling in ("layers.7.ffn.experts.11.w3.weight", "model.layers.7.mlp.experts.11.up_proj.weight"):
        assert canonical(spelling) == expert_piece("model.layers.7.mlp.experts.gate_up_proj", 11, "w3")
    indexer_norm = "model.layers.2.self_attn.compressor.indexer.kv_norm.weight"
    for spelling in (
        "attn.indexer.compressor.norm",
        "self_attn.compressor.indexer.norm",
        "attn.compressor.indexer.kv_norm",
    ):
        assert canonical(f"layers.2.{spelling}.weight") == indexer_norm
    assert canonical("model.norm.weight") == canonical("norm.weight") == "model.norm.weight"
    assert canonical("something.else") == "something.else"


@pytest.mark.parametrize("name", PRESETS)
def test_our_names_are_canonical(name: str) -> None:
    specs = tensor_specs(PRESETS[name])
    assert all(canonical(ours) == ours for ours in specs)
    assert not any(is_mtp(PRESETS[name], ours) for ours in specs)


def test_mtp() -> None:
    config = preset("v4-nano")
    for name in ("mtp.0.attn.wq_a.weight", "model.mtp.0.enorm.weight", "layers.6.attn.wq_a.weight"):
        assert is_mtp(config, name)
    assert not is_mtp(config, "layers.5.attn.wq_a.weight")


def test_engram_tensors() -> None:
    config = preset("v4-nano-engram")
    assert config.engram is not None
    specs = tensor_specs(config)
    extra = {name: info.shape for name, info in specs.items() if name not in tensor_specs(preset("v4-nano"))}
    rows = [int(config.engram.primes(layer).sum()) for layer in (1, 2)]
    for layer, table in zip((1, 2), rows, strict=True):
        prefix = f"model.layers.{layer}.engram."
        assert extra.pop(prefix + "embedding.weight") == (table, 4)
        assert extra.pop(prefix + "key_proj.weight") == (4 * 128, 8 * 4)
        assert extra.pop(prefix + "value_proj.weight") == (128, 8 * 4)
        for norm in ("key_norm", "stream_norm", "conv_norm"):
            assert specs[f"{prefix}{norm}.weight"].kind == "fp32"
            assert extra.pop(f"{prefix}{norm}.weight") == (4, 128)
        assert extra.pop(prefix + "conv.weight") == (4 * 128, 4)
        assert extra.pop(prefix + "multipliers") == (3,)
        assert extra.pop(prefix + "primes") == extra.pop(prefix + "offsets") == (8,)
    assert extra == {"model.engram_lookup": (4096,)}
