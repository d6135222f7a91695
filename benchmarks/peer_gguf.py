"""Writes a v4c checkpoint as a GGUF file that llama.cpp reads: the same values, converted to one of its formats.

Keys and tensor names are those of llama.cpp's architecture ``deepseek4`` (``src/models/deepseek4.cpp``); file format
and rounding of blocks are the `gguf` library's. Matrices that are multiplied, embedding and head take the format asked
for. Routers, hyper-connections, norms, sinks and biases are float32, as llama.cpp's own converter keeps them and
as v4c does.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from v4c.errors import OutputError, UnsupportedError
from v4c.frontend.checkpoint import Checkpoint
from v4c.frontend.config import ModelConfig
from v4c.progress import Progress

ARCHITECTURE = "deepseek4"

FORMATS = {
    "f32": gguf.GGMLQuantizationType.F32,
    "bf16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
}

_RATIOS = {"sliding": 0, "csa": 4, "hca": 128}
"""What llama.cpp compresses by; it has the ratios built in."""
_HADAMARD = 64
"""The smallest rotation that llama.cpp applies to the indexer's rows (a Hadamard matrix: scores stay the same)."""

_IN_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.sinks": "attn_sinks.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_norm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_proj.weight": "attn_kv.weight",
    "self_attn.kv_norm.weight": "attn_kv_a_norm.weight",
    "self_attn.o_a_proj.weight": "attn_output_a.weight",
    "self_attn.o_b_proj.weight": "attn_output_b.weight",
    "self_attn.compressor.kv_proj.weight": "attn_compressor_kv.weight",
    "self_attn.compressor.gate_proj.weight": "attn_compressor_gate.weight",
    "self_attn.compressor.position_bias": "attn_compressor_ape.weight",
    "self_attn.compressor.kv_norm.weight": "attn_compressor_norm.weight",
    "self_attn.compressor.indexer.kv_proj.weight": "indexer_compressor_kv.weight",
    "self_attn.compressor.indexer.gate_proj.weight": "indexer_compressor_gate.weight",
    "self_attn.compressor.indexer.position_bias": "indexer_compressor_ape.weight",
    "self_attn.compressor.indexer.kv_norm.weight": "indexer_compressor_norm.weight",
    "self_attn.compressor.indexer.q_b_proj.weight": "indexer.attn_q_b.weight",
    "self_attn.compressor.indexer.scorer.weights_proj.weight": "indexer.proj.weight",
    "attn_hc.fn": "hc_attn_fn.weight",
    "attn_hc.base": "hc_attn_base.weight",
    "attn_hc.scale": "hc_attn_scale.weight",
    "ffn_hc.fn": "hc_ffn_fn.weight",
    "ffn_hc.base": "hc_ffn_base.weight",
    "ffn_hc.scale": "hc_ffn_scale.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.tid2eid": "ffn_gate_tid2eid.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
    "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
}
_OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "model.hc_head.hc_fn": "output_hc_fn.weight",
    "model.hc_head.hc_base": "output_hc_base.weight",
    "model.hc_head.hc_scale": "output_hc_scale.weight",
    "lm_head.weight": "output.weight",
}
_ROWS = 4096
"""Rows of a matrix that are converted at once."""
_GATE_UP = "mlp.experts.gate_up_proj"
_HALVES = ("ffn_gate_exps.weight", "ffn_up_exps.weight")
"""llama.cpp keeps the gate and up projections of the experts apart."""


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file.

    Attributes:
        name: as llama.cpp calls it.
        source: the checkpoint's name of the tensor it is, or is a part of.
        shape: of the part, outermost dimension first; the file lists dimensions the other way round.
        rows: the part of axis 1 of `source`; None where it is the whole tensor.
        format: what its values are stored as.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    rows: slice | None
    format: gguf.GGMLQuantizationType

    @property
    def nbytes(self) -> int:
        """Bytes in the file, padding apart."""
        return int(np.prod(gguf.quant_shape_to_byte_shape(self.shape, self.format)))


def tensors(checkpoint: Checkpoint, storage: str) -> Iterator[Tensor]:
    """Every tensor of the file, in its order.

    Args:
        checkpoint: what is written.
        storage: one of `FORMATS`, for matrices.
    """
    float32, chosen = gguf.GGMLQuantizationType.F32, FORMATS[storage]
    for source, info in checkpoint.specs.items():
        inside = source.split(".", 3)[3] if source.startswith("model.layers.") else None
        prefix = f"blk.{source.split('.')[2]}." if inside else ""
        if info.kind == "int64":
            form = gguf.GGMLQuantizationType.I32
        else:
            form = chosen if info.kind == "weight" and inside != "mlp.gate.weight" else float32
        if inside == _GATE_UP:
            experts, both, width = info.shape
            half = both // 2
            for place, name in enumerate(_HALVES):
                part = slice(place * half, (place + 1) * half)
                yield Tensor(prefix + name, source, (experts, half, width), part, form)
            continue
        table = _IN_LAYER if inside else _OUTSIDE
        name = table.get(inside or source, "")
        if not name:
            raise UnsupportedError(f"{source}: expected a tensor that llama.cpp has a name for, found none")
        yield Tensor(prefix + name, source, info.shape, None, form)


def write_gguf(checkpoint: Checkpoint, path: Path, storage: str, progress: Progress | None = None) -> None:
    """Write `checkpoint` as one GGUF file; it appears only when it is complete.

    Args:
        checkpoint: an opened checkpoint.
        path: the file, in an existing folder; an older one is replaced.
        storage: one of `FORMATS`.
        progress: called with (what, bytes done, bytes in all).

    Raises:
        OutputError: the file cannot be written.
        UnsupportedError: the model is not one that llama.cpp has.
    """
    check_supported(checkpoint.config, storage)
    listed = list(tensors(checkpoint, storage))
    total, done = sum(t.nbytes for t in listed), 0
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            building = Path(folder) / path.name
            writer = gguf.GGUFWriter(building, ARCHITECTURE)
            _add_keys(writer, checkpoint.config)
            for tensor in listed:
                # A dtype is needed, but the format decides: shapes are given in elements.
                writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, tensor.format)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in listed:
                if progress:
                    progress(f"write {path.name}", done, total)
                writer.write_tensor_data(_values(checkpoint, tensor))
                done += tensor.nbytes
            writer.close()
            os.replace(building, path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error


def check_supported(config: ModelConfig, storage: str) -> None:
    """Refuse what llama.cpp's ``deepseek4`` cannot be told.

    Raises:
        UnsupportedError: with what was expected and found.
    """
    if config.engram is not None:
        raise UnsupportedError("llama.cpp: expected a model without Engram, found one with it")
    if config.index_head_dim % _HADAMARD:
        expected = f"an index_head_dim in multiples of {_HADAMARD}"
        raise UnsupportedError(f"llama.cpp: expected {expected}, found {config.index_head_dim}")
    for kind, ratio in _RATIOS.items():
        found = {config.ratio(layer) for layer in config.layers_of(kind)} - {ratio}
        if found:
            raise UnsupportedError(f"llama.cpp: expected {kind} layers to compress by {ratio}, found {min(found)}")
    hashed = config.mlp_types.count("hash")
    if "hash" in config.mlp_types[hashed:]:
        raise UnsupportedError("llama.cpp: expected hash-routed layers to be the first ones, found others before one")
    block = gguf.GGML_QUANT_SIZES[FORMATS[storage]][0]
    widths = (config.hidden_size, config.q_lora_rank, config.moe_intermediate_size, config.o_lora_rank)
    if any(width % block for width in widths):
        raise UnsupportedError(f"llama.cpp {storage}: expected widths in multiples of {block}, found {widths}")


def _add_keys(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    """The model's sizes. Written by key, for `gguf` of PyPI has no methods yet for those of V4."""
    limits = [float(config.swiglu_limit)] * config.num_hidden_layers
    integers = {
        "vocab_size": config.vocab_size, "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size, "embedding_length_out": config.hidden_size * config.hc_mult,
        "block_count": config.num_hidden_layers, "feed_forward_length": config.moe_intermediate_size,
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": 1,
        "attention.key_length": config.head_dim, "attention.value_length": config.head_dim,
        "attention.q_lora_rank": config.q_lora_rank, "attention.sliding_window": config.sliding_window,
        "attention.indexer.head_count": config.index_n_heads, "attention.indexer.key_length": config.index_head_dim,
        "attention.indexer.top_k": config.index_topk, "attention.output_group_count": config.o_groups,
        "attention.output_lora_rank": config.o_lora_rank, "rope.dimension_count": config.qk_rope_head_dim,
        "expert_count": config.n_routed_experts, "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size, "expert_shared_count": config.n_shared_experts,
        "expert_gating_func": 4,  # sqrt(softplus)
        "hyper_connection.count": config.hc_mult, "hyper_connection.sinkhorn_iterations": config.hc_sinkhorn_iters,
        "hash_layer_count": config.mlp_types.count("hash"),
    }  # fmt: skip
    floats = {
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps, "rope.freq_base": config.rope_theta,
        "attention.compress_rope_freq_base": config.compress_rope_theta,
        "expert_weights_scale": config.routed_scaling_factor, "hyper_connection.epsilon": config.hc_eps,
    }  # fmt: skip
    if config.yarn is not None:
        integers["rope.scaling.original_context_length"] = config.yarn.original_max_position_embeddings
        floats |= {
            "rope.scaling.factor": config.yarn.factor, "rope.scaling.yarn_beta_fast": config.yarn.beta_fast,
            "rope.scaling.yarn_beta_slow": config.yarn.beta_slow,
        }  # fmt: skip
    for key, number in integers.items():
        writer.add_uint32(f"{ARCHITECTURE}.{key}", number)
    for key, value in floats.items():
        writer.add_float32(f"{ARCHITECTURE}.{key}", value)
    writer.add_bool(f"{ARCHITECTURE}.expert_weights_norm", True)
    writer.add_string(f"{ARCHITECTURE}.rope.scaling.type", "none" if config.yarn is None else "yarn")
    writer.add_array(f"{ARCHITECTURE}.attention.compress_ratios", list(config.compress_ratios))
    writer.add_array(f"{ARCHITECTURE}.swiglu_clamp_exp", limits)
    writer.add_array(f"{ARCHITECTURE}.swiglu_clamp_shexp", limits)
    writer.add_string("tokenizer.ggml.model", "none")


def _values(checkpoint: Checkpoint, tensor: Tensor) -> np.ndarray:
    """The tensor's bytes as they stand in the file: uint8 for blocks and bfloat16, else float32 or int32."""
    stored = checkpoint.load(tensor.source)
    if tensor.rows is not None:
        stored = stored[:, tensor.rows]
    if tensor.format == gguf.GGMLQuantizationType.I32:
        return stored.astype(np.int32)
    if tensor.format == gguf.GGMLQuantizationType.F32:
        return np.ascontiguousarray(stored, np.float32)
    # In pieces: a stack of V4-Flash's experts, or its head, is gigabytes in float32.
    result = np.empty(gguf.quant_shape_to_byte_shape(tensor.shape, tensor.format), np.uint8)
    step = 1 if len(tensor.shape) > 2 else _ROWS
    for start in range(0, len(stored), step):
        piece = np.ascontiguousarray(stored[start : start + step], np.float32)
        result[start : start + step] = gguf.quants.quantize(piece, tensor.format).view(np.uint8)
    return result
