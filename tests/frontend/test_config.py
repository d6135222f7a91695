"""Configs: both JSON layouts against transformers' own config class, and every refusal with the key it names."""

from __future__ import annotations

import copy
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import DeepseekV4Config

from v4c.errors import ConfigError, UnsupportedError
from v4c.frontend.config import ModelConfig, YarnScaling
from v4c.frontend.presets import PRESETS, preset

HF_ATTENTION = ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"]
OUR_ATTENTION = dict(zip(HF_ATTENTION, ("sliding", "csa", "hca"), strict=True))
SAME_IN_BOTH = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "q_lora_rank", "o_groups",
    "o_lora_rank", "n_routed_experts", "num_experts_per_tok", "n_shared_experts", "moe_intermediate_size",
    "routed_scaling_factor", "swiglu_limit", "sliding_window", "index_n_heads", "index_head_dim", "index_topk",
    "hc_mult", "hc_sinkhorn_iters", "hc_eps", "rms_norm_eps", "max_position_embeddings", "num_nextn_predict_layers",
    "bos_token_id", "pad_token_id", "qk_rope_head_dim",
)  # fmt: skip
OPTIONAL = {
    "architectures", "attention_bias", "attention_dropout", "bos_token_id", "eos_token_id", "expert_dtype",
    "hidden_act", "initializer_range", "model_type", "n_shared_experts", "norm_topk_prob", "num_key_value_heads",
    "num_nextn_predict_layers", "rope_scaling", "quantization_config", "scoring_func", "tie_word_embeddings",
    "topk_method", "torch_dtype", "use_cache",
}  # fmt: skip


def published() -> dict[str, Any]:
    """V4-Flash's config.json as published, written down independently of the preset."""
    return {
        "architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4", "attention_bias": False,
        "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 1, "expert_dtype": "fp4", "hc_eps": 1e-06,
        "hc_mult": 4, "hc_sinkhorn_iters": 20, "head_dim": 512, "hidden_act": "silu", "hidden_size": 4096,
        "index_head_dim": 128,
        "index_n_heads": 64, "index_topk": 512, "initializer_range": 0.02, "max_position_embeddings": 1048576,
        "moe_intermediate_size": 2048, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True,
        "num_attention_heads": 64, "num_experts_per_tok": 6, "num_hidden_layers": 43, "num_hash_layers": 3,
        "num_key_value_heads": 1, "num_nextn_predict_layers": 1, "o_groups": 8, "o_lora_rank": 1024,
        "q_lora_rank": 1024, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_theta": 10000,
        "routed_scaling_factor": 1.5,
        "rope_scaling": {
            "beta_fast": 32, "beta_slow": 1, "factor": 16, "original_max_position_embeddings": 65536, "type": "yarn",
        },
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"},
        "scoring_func": "sqrtsoftplus", "sliding_window": 128, "swiglu_limit": 10.0, "tie_word_embeddings": False,
        "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 129280,
        "compress_rope_theta": 160000, "compress_ratios": [0, 0, 4] + [128, 4] * 20 + [0],
    }  # fmt: skip


def hf_config(**values: Any) -> Any:
    """transformers' config class, untyped: it accepts keys of older layouts that its signature does not list."""
    return DeepseekV4Config(**values)


@st.composite
def hf_configs(draw: st.DrawFn) -> Any:
    layers = draw(st.integers(1, 6))
    head_dim = draw(st.integers(4, 80))
    rope = 2 * draw(st.integers(1, min(head_dim, 16) // 2))
    # For some pairs transformers' own truncation loses a dim; such a file contradicts itself and is refused.
    assume(int(head_dim * (rope / head_dim)) == rope)
    groups = draw(st.integers(1, 4))
    experts = draw(st.integers(1, 20))
    layer = st.sampled_from(HF_ATTENTION)
    mlp = st.sampled_from(["hash_moe", "moe"])
    yarn = {
        "rope_type": "yarn", "factor": draw(st.floats(1.5, 64)), "original_max_position_embeddings": 4096,
        "beta_fast": draw(st.floats(8, 64)), "beta_slow": draw(st.floats(0.5, 2)),
    }  # fmt: skip
    return hf_config(
        vocab_size=draw(st.integers(10, 1000)),
        hidden_size=draw(st.integers(1, 100)),
        num_hidden_layers=layers,
        num_attention_heads=groups * draw(st.integers(1, 4)),
        head_dim=head_dim,
        # As the reference truncates: half a dim more is the same width.
        partial_rotary_factor=draw(st.sampled_from([(rope + 0.5) / head_dim, None])) if rope < head_dim else None,
        qk_rope_head_dim=rope,
        q_lora_rank=draw(st.integers(1, 50)),
        o_groups=groups,
        o_lora_rank=draw(st.integers(1, 50)),
        n_routed_experts=experts,
        num_experts_per_tok=draw(st.integers(1, experts)),
        moe_intermediate_size=draw(st.integers(1, 50)),
        layer_types=draw(st.lists(layer, min_size=layers, max_size=layers)),
        mlp_layer_types=draw(st.lists(mlp, min_size=layers, max_size=layers)),
        compress_rates=dict(zip(HF_ATTENTION[1:], (draw(st.integers(2, 8)), draw(st.integers(9, 200))), strict=True)),
        sliding_window=draw(st.integers(1, 200)),
        index_head_dim=draw(st.integers(16, 128)),
        index_n_heads=draw(st.integers(1, 64)),
        index_topk=draw(st.integers(1, 1024)),
        swiglu_limit=draw(st.floats(0.1, 20)),
        rope_theta=draw(st.floats(100, 1e6)),
        compress_rope_theta=draw(st.floats(100, 1e6)),
        rope_parameters=draw(st.sampled_from([yarn, None])),
        eos_token_id=draw(st.sampled_from([1, [1, 5], None])),
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),
    )


@settings(deadline=None, max_examples=30)
@given(hf_configs())
def test_reads_what_transformers_writes(hf: Any) -> None:
    config = ModelConfig.from_dict(json.loads(hf.to_json_string()))
    for key in SAME_IN_BOTH:
        assert getattr(config, key) == getattr(hf, key), key
    assert config.attention_types == tuple(OUR_ATTENTION[kind] for kind in hf.layer_types)
    assert config.mlp_types == tuple({"hash_moe": "hash", "moe": "topk"}[kind] for kind in hf.mlp_layer_types)
    rates = {"sliding_attention": 0, **hf.compress_rates}
    assert config.compress_ratios == tuple(rates[kind] for kind in hf.layer_types)
    main, compress = hf.rope_parameters["main"], hf.rope_parameters["compress"]
    assert (config.rope_theta, config.compress_rope_theta) == (main["rope_theta"], compress["rope_theta"])
    if compress["rope_type"] == "yarn":
        assert config.yarn == YarnScaling(compress["factor"], 4096, compress["beta_fast"], compress["beta_slow"])
    else:
        assert config.yarn is None
    eos = hf.eos_token_id
    assert config.eos_token_ids == (() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,))
    assert config.dtype == str(hf.dtype).removeprefix("torch.")


@settings(deadline=None, max_examples=30)
@given(hf_configs())
def test_transformers_reads_what_we_write(hf: Any) -> None:
    config = ModelConfig.from_dict(json.loads(hf.to_json_string()))
    again = hf_config(**json.loads(json.dumps(config.to_dict())))
    for key in (*SAME_IN_BOTH, "layer_types", "mlp_layer_types", "compress_rates", "eos_token_id"):
        assert getattr(again, key) == getattr(hf, key), key
    assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_a_file(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PRESETS[name].to_dict()))
    assert ModelConfig.from_file(tmp_path) == PRESETS[name]
    assert ModelConfig.from_file(tmp_path / "config.json") == PRESETS[name]


def test_published_layout() -> None:
    assert ModelConfig.from_dict(published()) == preset("v4-flash")
    without_mtp = published()
    without_mtp["compress_ratios"].pop()
    assert ModelConfig.from_dict(without_mtp) == preset("v4-flash")
    # What transformers makes of the same file.
    hf = json.loads(hf_config(**published()).to_json_string())
    assert ModelConfig.from_dict(hf) == preset("v4-flash")


def test_rotary_width_survives_truncation() -> None:
    """``int(head_dim * (width / head_dim))`` loses one for some pairs; what we write must not."""
    pairs = [(c, width) for c in range(2, 400) for width in range(2, c, 2) if int(c * (width / c)) != width]
    assert len(pairs) > 100
    for head_dim, width in pairs[:: len(pairs) // 20]:
        config = replace(preset("v4-nano"), head_dim=head_dim, qk_rope_head_dim=width, index_head_dim=512)
        written = config.to_dict()
        del written["qk_rope_head_dim"]
        assert hf_config(**written).qk_rope_head_dim == width
        assert ModelConfig.from_dict(written).qk_rope_head_dim == width


@pytest.mark.parametrize("key", sorted(set(published()) - OPTIONAL))
def test_missing_keys_are_named(key: str) -> None:
    values = published()
    del values[key]
    named = {"compress_ratios": "layer_types", "num_hash_layers": "mlp_layer_types"}.get(key, key)
    with pytest.raises(ConfigError, match=rf"^some\.json: {named}: expected .*, found no such key$"):
        ModelConfig.from_dict(values, "some.json")


def test_a_file_must_say_what_it_is() -> None:
    values = published()
    del values["model_type"], values["architectures"]
    with pytest.raises(ConfigError, match=r"model_type: expected 'deepseek_v4', found no such key"):
        ModelConfig.from_dict(values)


NESTED_YARN = {"rope_type": "yarn", "rope_theta": 160000, "factor": 16, "original_max_position_embeddings": 65536}
PLAIN = {"rope_type": "default", "rope_theta": 10000}


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("hidden_size", True, "hidden_size"),
        ("hidden_size", "4096", "hidden_size"),
        ("hidden_size", 4096.0, "hidden_size"),
        ("hidden_size", 0, "hidden_size"),
        ("hidden_size", -4096, "hidden_size"),
        ("hidden_size", 2**40, "hidden_size"),
        ("hidden_size", None, "hidden_size"),
        ("n_routed_experts", 10**6, "n_routed_experts"),
        ("hc_eps", math.nan, "hc_eps"),
        ("hc_eps", math.inf, "hc_eps"),
        ("hc_eps", 0, "hc_eps"),
        ("swiglu_limit", True, "swiglu_limit"),
        ("swiglu_limit", 10**400, "swiglu_limit"),
        ("index_topk", 0, "index_topk"),
        ("sliding_window", -1, "sliding_window"),
        ("hc_sinkhorn_iters", 0, "hc_sinkhorn_iters"),
        ("num_experts_per_tok", 257, "num_experts_per_tok"),
        ("o_groups", 7, "o_groups"),
        ("qk_rope_head_dim", 63, "qk_rope_head_dim"),
        ("qk_rope_head_dim", 514, "qk_rope_head_dim"),
        ("index_head_dim", 32, "qk_rope_head_dim"),
        ("partial_rotary_factor", 0.25, "partial_rotary_factor"),
        ("n_shared_experts", 2, "n_shared_experts"),
        ("num_key_value_heads", 2, "num_key_value_heads"),
        ("num_key_value_heads", True, "num_key_value_heads"),
        ("scoring_func", "softmax", "scoring_func"),
        ("hidden_act", "gelu", "hidden_act"),
        ("norm_topk_prob", False, "norm_topk_prob"),
        ("norm_topk_prob", 1, "norm_topk_prob"),
        ("attention_bias", True, "attention_bias"),
        ("tie_word_embeddings", True, "tie_word_embeddings"),
        ("compress_ratios", [0] * 42, "compress_ratios"),
        ("compress_ratios", [0] * 45, "compress_ratios"),
        ("compress_ratios", [0] * 42 + [8], "compress_ratios[42]"),
        ("compress_ratios", [0] * 42 + [False], "compress_ratios[42]"),
        ("compress_ratios", 4, "compress_ratios"),
        ("layer_types", ["sliding_attention"] * 44, "layer_types"),
        ("layer_types", ["sliding_attention"] * 42 + ["full_attention"], "layer_types[42]"),
        ("layer_types", ["sliding_attention"] * 42 + [[]], "layer_types[42]"),
        ("layer_types", ["sliding_attention"] * 43, "compress_ratios"),
        ("num_hash_layers", 44, "num_hash_layers"),
        ("num_hash_layers", -1, "num_hash_layers"),
        ("mlp_layer_types", ["moe"] * 43, "num_hash_layers"),
        ("mlp_layer_types", ["moe"] * 42, "mlp_layer_types"),
        ("mlp_layer_types", ["dense"] * 43, "mlp_layer_types[0]"),
        ("compress_rates", {"compressed_sparse_attention": 4}, "compress_rates.heavily_compressed_attention"),
        ("compress_rates", {"compressed_sparse_attention": 8, "heavily_compressed_attention": 128}, "compress_rates"),
        ("rope_theta", 1, "rope_theta"),
        ("rope_scaling", [], "rope_scaling"),
        ("rope_scaling", {"type": "yarn"}, "rope_scaling.factor"),
        ("rope_scaling", NESTED_YARN | {"rope_type": "linear"}, "rope_scaling.rope_type"),
        ("rope_scaling", NESTED_YARN | {"factor": 0.5}, "rope_scaling.factor"),
        ("rope_scaling", NESTED_YARN | {"attention_factor": 1.277}, "rope_scaling.attention_factor"),
        ("rope_scaling", NESTED_YARN | {"attention_factor": None}, "rope_scaling.attention_factor"),
        ("rope_scaling", NESTED_YARN | {"truncate": 1}, "rope_scaling.truncate"),
        ("rope_parameters", {"main": NESTED_YARN, "compress": NESTED_YARN}, "rope_parameters.main.rope_type"),
        ("rope_parameters", {"main": PLAIN | {"rope_theta": 5}, "compress": NESTED_YARN}, "rope_theta"),
        ("rope_parameters", {"main": PLAIN, "compress": NESTED_YARN | {"rope_theta": 5}}, "compress_rope_theta"),
        (
            "rope_parameters",
            {"main": PLAIN, "compress": NESTED_YARN | {"attention_factor": 1.2}},
            "rope_parameters.compress.attention_factor",
        ),
        ("bos_token_id", 129280, "bos_token_id"),
        ("eos_token_id", [1, -1], "eos_token_id"),
        ("eos_token_id", [1, "2"], "eos_token_id"),
        ("pad_token_id", False, "pad_token_id"),
        ("torch_dtype", "float8_e4m3fn", "torch_dtype"),
        ("model_type", "deepseek_v3", "model_type"),
        ("model_type", None, "no error: the architecture says enough"),
        ("architectures", ["LlamaForCausalLM"], "architectures"),
        ("architectures", "DeepseekV4ForCausalLM", "architectures"),
        ("engram", {"layer_ids": "1"}, "engram.layer_ids"),
        ("engram", {"layer_ids": [1]}, "engram.heads_per_ngram"),
        ("engram", 5, "engram"),
    ],
)
def test_refusals_name_the_key(key: str, value: Any, named: str) -> None:
    values = published() | {key: value}
    if named.startswith("no error"):
        assert ModelConfig.from_dict(values) == preset("v4-flash")
        return
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(values, "some.json")
    message = str(caught.value)
    assert message.startswith(f"some.json: {named}: expected ")
    assert ", found " in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "changes",
    [{"model_type": "deepseek_v41"}, {"architectures": ["DeepseekV41ForCausalLM"]}],
)
def test_v41_is_refused_by_name(changes: dict[str, Any]) -> None:
    values = published() | changes
    del values["num_hash_layers"]
    with pytest.raises(UnsupportedError, match=r"DeepSeek-V4\.1"):
        ModelConfig.from_dict(values)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"{", "valid JSON"),
        (b"", "valid JSON"),
        (b"[]", "a JSON object"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b'{"a": 1, "a": 1}', "twice"),
        (b'{"x": {"a": 1, "a": 2}}', "twice"),
        (b'{"a": "\xff"}', "UTF-8"),
        (b'{"a": ' + b"[" * 100_000, "sane size and depth"),
        (b'{"a": ' + b"1" * 10_000 + b"}", "sane size and depth"),
    ],
)
def test_bad_files(data: bytes, found: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=found) as caught:
        ModelConfig.from_file(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: expected a readable"):
        ModelConfig.from_file(tmp_path)


def test_finite_overflow_in_json(tmp_path: Path) -> None:
    """1e999 is valid JSON and becomes infinity."""
    text = json.dumps(published()).replace('"hc_eps": 1e-06', '"hc_eps": 1e999')
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match="hc_eps: expected a finite number, found inf"):
        ModelConfig.from_file(tmp_path)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(sorted(published())), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=5,
))  # fmt: skip
def test_any_value_parses_or_is_refused(key: str, value: Any) -> None:
    """Whatever stands behind a key: a config or one of our errors, never another exception."""
    values = copy.deepcopy(published())
    values[key] = value
    try:
        config = ModelConfig.from_dict(values)
    except (ConfigError, UnsupportedError):
        return
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_direct_construction_is_checked() -> None:
    with pytest.raises(ConfigError, match="attention_types: expected 6 entries, found 1"):
        replace(preset("v4-nano"), attention_types=("csa",))
    with pytest.raises(ConfigError, match=r"attention_types\[0\]: expected one of sliding, csa, hca, found 'full'"):
        replace(preset("v4-nano"), attention_types=("full",) * 6)


def test_layers_of() -> None:
    config = preset("v4-mini")
    assert config.compress_ratios == (0, 0, 4, 128, 4, 128, 4, 128)
    assert config.layers_of("csa") == (2, 4, 6)
    assert config.layers_of("sliding") == (0, 1)
    assert config.layers_of("hash") == (0, 1)
    assert config.layers_of("topk") == (2, 3, 4, 5, 6, 7)
