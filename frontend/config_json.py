"""The two JSON layouts of a DeepSeek-V4 config: as published, and as transformers 5.23 rewrites it.

The published file gives `compress_ratios` (with an entry per MTP layer at the end), `num_hash_layers` and a flat
`rope_scaling`; the rewritten one gives `layer_types`, `compress_rates`, `mlp_layer_types` and nested `rope_parameters`.
Where a file holds both, they must agree.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from v4c.errors import ConfigError, UnsupportedError

from .config import DTYPES, ModelConfig, YarnScaling
from .engram_config import EngramConfig
from .strict_json import read_object, show

ARCHITECTURE = "DeepseekV4ForCausalLM"
MODEL_TYPE = "deepseek_v4"

_LAYER_TYPES = {
    "sliding_attention": "sliding",
    "compressed_sparse_attention": "csa",
    "heavily_compressed_attention": "hca",
}
_MLP_LAYER_TYPES = {"hash_moe": "hash", "moe": "topk"}
_PUBLISHED_RATIOS = {0: "sliding", 4: "csa", 128: "hca"}

# Copied as they are; `ModelConfig` checks their ranges.
_PLAIN_INTEGERS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "q_lora_rank", "o_groups",
    "o_lora_rank", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "sliding_window",
    "index_n_heads", "index_head_dim", "index_topk", "hc_mult", "hc_sinkhorn_iters", "max_position_embeddings",
)  # fmt: skip
_PLAIN_NUMBERS = ("routed_scaling_factor", "swiglu_limit", "hc_eps", "rms_norm_eps")
# Switches of the reference that v4c knows one position of.
_FIXED = {
    "num_key_value_heads": 1,
    "scoring_func": "sqrtsoftplus",
    "hidden_act": "silu",
    "norm_topk_prob": True,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
_ABSENT: Any = object()


class _Fields:
    """Typed access to one JSON object; every error names the key, what was expected and what was found."""

    def __init__(self, values: dict[str, Any], source: str, prefix: str = "") -> None:
        self.values, self.source, self.prefix = values, source, prefix

    def error(self, key: str, expected: str, found: str) -> ConfigError:
        return ConfigError(f"{self.source}: {self.prefix}{key}: expected {expected}, found {found}")

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def _get(self, key: str, expected: str, default: Any) -> Any:
        if key in self.values:
            return self.values[key]
        if default is _ABSENT:
            raise self.error(key, expected, "no such key")
        return default

    def integer(self, key: str, default: Any = _ABSENT) -> int:
        value = self._get(key, "an integer", default)
        if type(value) is not int:
            raise self.error(key, "an integer", show(value))
        return value

    def number(self, key: str, default: Any = _ABSENT) -> float:
        value = self._get(key, "a number", default)
        if type(value) not in (int, float):
            raise self.error(key, "a number", show(value))
        try:
            finite = math.isfinite(value)
        except OverflowError:
            finite = False
        if not finite:
            raise self.error(key, "a finite number", show(value))
        return float(value)

    def entries(self, key: str, kinds: dict[Any, str], what: str) -> list[str]:
        """A list whose entries are keys of `kinds`, translated."""
        values = self._get(key, f"a list of {what}", _ABSENT)
        if type(values) is not list:
            raise self.error(key, f"a list of {what}", show(values))
        known = ", ".join(str(kind) for kind in kinds)
        for place, value in enumerate(values):
            if type(value) not in (int, str) or value not in kinds:
                raise self.error(f"{key}[{place}]", f"one of {known}", show(value))
        return [kinds[value] for value in values]

    def object(self, key: str) -> _Fields:
        value = self._get(key, "an object", _ABSENT)
        if type(value) is not dict:
            raise self.error(key, "an object", show(value))
        return _Fields(value, self.source, f"{self.prefix}{key}.")

    def fixed(self, key: str, expected: Any) -> None:
        """`key` may be absent; if present it has one allowed value."""
        value = self.values.get(key, expected)
        if type(value) is not type(expected) or value != expected:
            raise self.error(key, str(expected).lower() if type(expected) is bool else show(expected), show(value))

    def agree(self, key: str, value: Any, because: str) -> None:
        """`key` may be absent; if present it repeats what `because` already said."""
        if self.has(key) and self.values[key] != value:
            raise self.error(key, f"{show(value)} as {because} says", show(self.values[key]))


def config_from_file(path: Path) -> ModelConfig:
    """See `ModelConfig.from_file`."""
    if path.is_dir():
        path = path / "config.json"
    return config_from_dict(read_object(path, ConfigError), str(path))


def config_from_dict(values: dict[str, Any], source: str) -> ModelConfig:
    """See `ModelConfig.from_dict`."""
    fields = _Fields(values, source)
    _check_family(fields)
    for key, expected in _FIXED.items():
        fields.fixed(key, expected)
    sizes: dict[str, Any] = {key: fields.integer(key) for key in _PLAIN_INTEGERS}
    sizes |= {key: fields.number(key) for key in _PLAIN_NUMBERS}
    sizes["n_shared_experts"] = fields.integer("n_shared_experts", 1)
    sizes["num_nextn_predict_layers"] = fields.integer("num_nextn_predict_layers", 0)
    try:
        return ModelConfig(
            **sizes,
            **_schedule(fields, sizes["num_hidden_layers"], sizes["num_nextn_predict_layers"]),
            **_rotary(fields, sizes["head_dim"]),
            bos_token_id=fields.integer("bos_token_id") if fields.has("bos_token_id") else None,
            eos_token_ids=_eos(fields),
            pad_token_id=fields.integer("pad_token_id") if fields.has("pad_token_id") else None,
            dtype=_dtype(fields),
            engram=_engram(fields.object("engram")) if fields.has("engram") else None,
        )
    except ConfigError as failure:
        if str(failure).startswith(f"{source}: "):
            raise
        raise ConfigError(f"{source}: {failure}") from None


def _check_family(fields: _Fields) -> None:
    architectures = fields.values.get("architectures") or []
    model_type = fields.values.get("model_type")
    if type(architectures) is not list:
        raise fields.error("architectures", "a list of names", show(architectures))
    if "DeepseekV41ForCausalLM" in architectures or model_type == "deepseek_v41":
        raise UnsupportedError(
            f"{fields.source}: expected a DeepSeek-V4 model ({ARCHITECTURE}), found DeepSeek-V4.1: another "
            "architecture (shared KV sources, no hash layers) that v4c does not support"
        )
    if architectures and ARCHITECTURE not in architectures:
        raise fields.error("architectures", ARCHITECTURE, show(architectures))
    if model_type != MODEL_TYPE and not (model_type is None and architectures):
        raise fields.error(
            "model_type", show(MODEL_TYPE), show(model_type) if model_type is not None else "no such key"
        )


def _schedule(fields: _Fields, layers: int, mtp_layers: int) -> dict[str, Any]:
    """Attention and MLP type per layer, and the two ratios."""
    csa_ratio, hca_ratio = 4, 128
    if fields.has("compress_rates"):
        rates = fields.object("compress_rates")
        csa_ratio = rates.integer("compressed_sparse_attention")
        hca_ratio = rates.integer("heavily_compressed_attention")
    csa_ratio = fields.integer("compress_rate_csa", csa_ratio)
    hca_ratio = fields.integer("compress_rate_hca", hca_ratio)

    if fields.has("layer_types"):
        attention = fields.entries("layer_types", _LAYER_TYPES, "attention types")
        if len(attention) != layers:
            raise fields.error("layer_types", f"{layers} entries, one per layer", str(len(attention)))
        if fields.has("compress_ratios"):
            ratio_of = {0: "sliding", csa_ratio: "csa", hca_ratio: "hca"}
            if fields.entries("compress_ratios", ratio_of, "ratios")[:layers] != attention:
                raise fields.error("compress_ratios", "the schedule that layer_types gives", "another")
    elif fields.has("compress_ratios"):
        attention = fields.entries("compress_ratios", _PUBLISHED_RATIOS, "ratios")
        if len(attention) not in (layers, layers + mtp_layers):
            wanted = f"{layers} entries, or {layers + mtp_layers} with the MTP layers"
            raise fields.error("compress_ratios", wanted, str(len(attention)))
        attention = attention[:layers]
        if (csa_ratio, hca_ratio) != (4, 128):
            raise fields.error("compress_rates", "4 and 128 beside compress_ratios", f"{csa_ratio} and {hca_ratio}")
    else:
        raise fields.error("layer_types", "a list (or compress_ratios)", "no such key")

    if fields.has("mlp_layer_types"):
        mlp = fields.entries("mlp_layer_types", _MLP_LAYER_TYPES, "MLP types")
        if len(mlp) != layers:
            raise fields.error("mlp_layer_types", f"{layers} entries, one per layer", str(len(mlp)))
        fields.agree("num_hash_layers", mlp.count("hash"), "mlp_layer_types")
    elif fields.has("num_hash_layers"):
        hashed = fields.integer("num_hash_layers")
        if not 0 <= hashed <= layers:
            raise fields.error("num_hash_layers", f"a number of layers from 0 to {layers}", str(hashed))
        mlp = ["hash"] * hashed + ["topk"] * (layers - hashed)
    else:
        raise fields.error("mlp_layer_types", "a list (or num_hash_layers)", "no such key")
    return {
        "attention_types": tuple(attention), "csa_ratio": csa_ratio, "hca_ratio": hca_ratio, "mlp_types": tuple(mlp),
    }  # fmt: skip


def _rotary(fields: _Fields, head_dim: int) -> dict[str, Any]:
    """Rotated dims, the two thetas, and YaRN."""
    parameters = fields.object("rope_parameters") if fields.has("rope_parameters") else None
    if parameters is not None and parameters.has("main") and parameters.has("compress"):
        main, compress = parameters.object("main"), parameters.object("compress")
        if _rope_type(main) != "default":
            raise main.error("rope_type", "'default': sliding layers rotate plainly", show(_rope_type(main)))
        theta, compress_theta = main.number("rope_theta"), compress.number("rope_theta")
        fields.agree("rope_theta", theta, "rope_parameters.main")
        fields.agree("compress_rope_theta", compress_theta, "rope_parameters.compress")
        yarn = _yarn(compress)
        factors = [fields, main, compress]
    else:
        theta, compress_theta = fields.number("rope_theta"), fields.number("compress_rope_theta")
        flat = parameters or (fields.object("rope_scaling") if fields.has("rope_scaling") else None)
        yarn = _yarn(flat) if flat is not None else None
        factors = [fields] if flat is None else [fields, flat]

    width = fields.integer("qk_rope_head_dim") if fields.has("qk_rope_head_dim") else None
    for place in factors:
        if not place.has("partial_rotary_factor"):
            continue
        factor = place.number("partial_rotary_factor")
        # transformers truncates the product; rounding errors just below a whole number are not meant.
        found = (
            round(head_dim * factor) if abs(head_dim * factor - round(head_dim * factor)) < 1e-6 else head_dim * factor
        )
        if width is None:
            width = int(found)
        if int(found) != width:
            raise place.error(
                "partial_rotary_factor", f"{width} of {head_dim} dims rotated", f"{factor} ({found:g} dims)"
            )
    if width is None:
        raise fields.error("qk_rope_head_dim", "an integer (or partial_rotary_factor)", "no such key")
    return {"qk_rope_head_dim": width, "rope_theta": theta, "compress_rope_theta": compress_theta, "yarn": yarn}


def _rope_type(fields: _Fields) -> Any:
    return fields.values.get("rope_type", fields.values.get("type", "default"))


def _yarn(fields: _Fields) -> YarnScaling | None:
    kind = _rope_type(fields)
    if kind == "default":
        return None
    if kind != "yarn":
        raise fields.error("rope_type", "'yarn' or 'default'", show(kind))
    # The reference forces amplitude 1.0; a file that asks for another would be computed otherwise than it says.
    amplitude = fields.values.get("attention_factor", 1.0)
    if type(amplitude) not in (int, float) or amplitude != 1:
        raise fields.error("attention_factor", "1.0", show(amplitude))
    truncate = fields.values.get("truncate", True)
    try:
        return YarnScaling(
            factor=fields.number("factor"),
            original_max_position_embeddings=fields.integer("original_max_position_embeddings"),
            beta_fast=fields.number("beta_fast") if fields.has("beta_fast") else 32.0,
            beta_slow=fields.number("beta_slow") if fields.has("beta_slow") else 1.0,
            truncate=truncate,
        )
    except ConfigError as failure:
        if str(failure).startswith(f"{fields.source}: "):
            raise
        raise ConfigError(f"{fields.source}: {fields.prefix}{failure}") from None


def _eos(fields: _Fields) -> tuple[int, ...]:
    value = fields.values.get("eos_token_id")
    if value is None:
        return ()
    tokens = value if type(value) is list else [value]
    for token in tokens:
        if type(token) is not int:
            raise fields.error("eos_token_id", "an integer or a list of integers", show(value))
    return tuple(tokens)


def _dtype(fields: _Fields) -> str:
    key = "dtype" if fields.has("dtype") else "torch_dtype"
    value = fields.values.get(key) or "float32"
    if value not in DTYPES:
        raise fields.error(key, f"one of {', '.join(DTYPES)}", show(value))
    return value


def _engram(fields: _Fields) -> EngramConfig:
    layer_ids = fields.values.get("layer_ids")
    if type(layer_ids) is not list or any(type(layer) is not int for layer in layer_ids):
        raise fields.error("layer_ids", "a list of layer numbers", show(layer_ids))
    keys = ("heads_per_ngram", "embed_dim", "table_rows", "pad_id", "seed", "max_ngram", "kernel_size")
    return EngramConfig(layer_ids=tuple(layer_ids), **{key: fields.integer(key) for key in keys})


def _rotary_factor(config: ModelConfig) -> float:
    """R / C, nudged where needed so that transformers' ``int(C * factor)`` gives R back."""
    factor = config.qk_rope_head_dim / config.head_dim
    return factor if int(config.head_dim * factor) == config.qk_rope_head_dim else math.nextafter(factor, 2)


def config_to_dict(config: ModelConfig) -> dict[str, Any]:
    """See `ModelConfig.to_dict`."""
    factor = _rotary_factor(config)
    main = {"rope_type": "default", "rope_theta": config.rope_theta, "partial_rotary_factor": factor}
    compress = {**main, "rope_theta": config.compress_rope_theta}
    if config.yarn is not None:
        compress |= {"rope_type": "yarn", "attention_factor": 1.0, **asdict(config.yarn)}
    names = {kind: name for name, kind in (_LAYER_TYPES | _MLP_LAYER_TYPES).items()}
    eos = list(config.eos_token_ids)
    result: dict[str, Any] = {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **{key: getattr(config, key) for key in _PLAIN_INTEGERS + _PLAIN_NUMBERS},
        **_FIXED,
        "n_shared_experts": config.n_shared_experts,
        "num_nextn_predict_layers": config.num_nextn_predict_layers,
        "layer_types": [names[kind] for kind in config.attention_types],
        "compress_rates": {
            "compressed_sparse_attention": config.csa_ratio,
            "heavily_compressed_attention": config.hca_ratio,
        },
        "mlp_layer_types": [names[kind] for kind in config.mlp_types],
        "qk_rope_head_dim": config.qk_rope_head_dim,
        "partial_rotary_factor": factor,
        "rope_theta": config.rope_theta,
        "compress_rope_theta": config.compress_rope_theta,
        "rope_parameters": {"main": main, "compress": compress},
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": config.pad_token_id,
        "dtype": config.dtype,
    }
    if config.engram is not None:
        result["engram"] = {**asdict(config.engram), "layer_ids": list(config.engram.layer_ids)}
    return result
