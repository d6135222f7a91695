"""The published layout of V4 weights: which tensors are FP8, FP4, bfloat16 or float32, and what a config says of it.

Routed experts are FP4; the other large matrices of attention, of the shared expert and of an MTP layer's input are FP8;
embeddings, output projection, compressors, routers and norms are bfloat16; hyper-connections, sinks and biases float32.
"""

from __future__ import annotations

from typing import Any, Literal

from v4c.errors import ConfigError, UnsupportedError

from .block_formats import FORMATS, FP8
from .config import ModelConfig
from .names import TensorInfo
from .strict_json import show

NativeFormat = Literal["fp8", "fp4", "bf16", "f32", "int64"]

_FP8_MATRICES = (
    "self_attn.q_a_proj.weight", "self_attn.q_b_proj.weight", "self_attn.kv_proj.weight", "self_attn.o_a_proj.weight",
    "self_attn.o_b_proj.weight", "indexer.q_b_proj.weight", "shared_experts.gate_proj.weight",
    "shared_experts.up_proj.weight", "shared_experts.down_proj.weight", ".e_proj.weight", ".h_proj.weight",
)  # fmt: skip


def is_expert_stack(name: str) -> bool:
    """Whether the tensor holds the matrices of all routed experts."""
    return name.endswith(("mlp.experts.gate_up_proj", "mlp.experts.down_proj"))


def native_format(name: str, info: TensorInfo) -> NativeFormat:
    """What the tensor `name` (a key of `names.tensor_specs` or `names.mtp_specs`) is published as."""
    if info.kind == "int64":
        return "int64"
    if is_expert_stack(name):
        return "fp4"
    if name.endswith(_FP8_MATRICES):
        return "fp8"
    return "f32" if info.kind == "fp32" and "norm" not in name else "bf16"


def native_bytes(name: str, info: TensorInfo) -> int:
    """Bytes of the tensor as published, its scales included."""
    stored = native_format(name, info)
    if stored not in FORMATS:
        return info.size * {"int64": 8, "f32": 4, "bf16": 2}[stored]
    *stack, rows, columns = info.shape
    count = stack[0] if stack else 1
    (down, across), (high, wide) = FORMATS[stored].code_shape(rows, columns), FORMATS[stored].scale_shape(rows, columns)
    return count * (down * across + high * wide)


def published_config(config: ModelConfig) -> dict[str, Any]:
    """``config.json`` as published: compress ratios with one for each MTP layer, flat YaRN keys, quantisation.

    Raises:
        UnsupportedError: a schedule that this layout has no words for.
    """
    values = config.to_dict()
    hashed = config.mlp_types.count("hash")
    if (config.csa_ratio, config.hca_ratio) != (4, 128) or "hash" in config.mlp_types[hashed:]:
        raise UnsupportedError(
            "published layout: expected ratios 4 and 128 and hash layers first, found "
            f"{config.csa_ratio} and {config.hca_ratio}, {', '.join(config.mlp_types)}"
        )
    for key in ("layer_types", "compress_rates", "mlp_layer_types", "rope_parameters", "partial_rotary_factor"):
        del values[key]
    values["torch_dtype"] = values.pop("dtype")
    values["compress_ratios"] = [*config.compress_ratios, *[0] * config.num_nextn_predict_layers]
    values["num_hash_layers"] = hashed
    if config.yarn is not None:
        values["rope_scaling"] = {
            "type": "yarn",
            "factor": config.yarn.factor,
            "original_max_position_embeddings": config.yarn.original_max_position_embeddings,
            "beta_fast": config.yarn.beta_fast,
            "beta_slow": config.yarn.beta_slow,
            **({} if config.yarn.truncate else {"truncate": False}),
        }
    return values | QUANTIZATION


QUANTIZATION: dict[str, Any] = {
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "scale_fmt": "ue8m0",
        "activation_scheme": "dynamic",
        "weight_block_size": [FP8.block_rows, FP8.block_columns],
    },
    "expert_dtype": "fp4",
}
"""What ``config.json`` says of the formats."""


def check_quantization(values: dict[str, Any], source: str) -> None:
    """Refuse a ``config.json`` whose weights are quantised in another way than this module describes.

    Which tensors are FP8 or FP4, their own dtypes say; this keeps apart what looks alike and is not.

    Raises:
        ConfigError: a key of the wrong type.
        UnsupportedError: another method, block size or element format.
    """
    section = values.get("quantization_config")
    if section is None:
        return
    if type(section) is not dict:
        raise ConfigError(f"{source}: quantization_config: expected an object, found {show(section)}")
    expected: dict[str, tuple[Any, ...]] = {
        "quant_method": ("fp8",),
        "fmt": ("e4m3",),
        "weight_block_size": ([FP8.block_rows, FP8.block_columns],),
        "expert_dtype": ("fp4", "fp8"),
    }
    for key, known in expected.items():
        value = section.get(key)
        if value is not None and value not in known:
            wanted = " or ".join(show(one) for one in known)
            raise UnsupportedError(f"{source}: quantization_config.{key}: expected {wanted}, found {show(value)}")
    value = values.get("expert_dtype")
    if value not in (None, "fp4", "fp8", "bf16"):
        raise UnsupportedError(f"{source}: expert_dtype: expected 'fp4', 'fp8' or 'bf16', found {show(value)}")
