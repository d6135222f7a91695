"""Which tensors a model has, what they are called, and how the upstream spelling of a checkpoint maps to ours.

v4c uses Hugging Face's ``state_dict`` names throughout. Files on disk may use upstream's names, Hugging Face's, or
the mix that ``save_pretrained`` of transformers 5.23 writes; `canonical` understands all three.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from .config import ModelConfig

Kind = Literal["weight", "fp32", "int64"]
Join = Literal["copy", "stack", "stack_gate_up"]


@dataclass(frozen=True)
class TensorInfo:
    """Shape of a tensor, and its `kind`: ``"weight"`` follows the model's dtype, ``"fp32"`` is float32 always
    (hyper-connections, sinks, position and correction biases, norms), ``"int64"`` holds ids."""

    shape: tuple[int, ...]
    kind: Kind

    @property
    def size(self) -> int:
        """Number of elements."""
        size = 1
        for length in self.shape:
            size *= length
        return size


@dataclass(frozen=True)
class Source:
    """Where one tensor comes from: `pieces` joined by `join`.

    ``"copy"``: one piece. ``"stack"``: one piece per expert along a new first axis. ``"stack_gate_up"``: the same,
    where each expert has two pieces in a row (w1 the gate, w3 the up projection), stacked on top of each other.
    """

    pieces: tuple[str, ...]
    join: Join


# Upstream's word for each part of a name, and ours. Files mix both, for transformers undoes on saving only those of its
# renaming rules that it applied on loading; so parts are translated one by one.
_PARTS = {
    "attn": "self_attn", "attn_sink": "sinks", "wq_a": "q_a_proj", "q_norm": "q_a_norm", "wq_b": "q_b_proj",
    "wkv": "kv_proj", "wgate": "gate_proj", "norm": "kv_norm", "wo_a": "o_a_proj", "wo_b": "o_b_proj",
    "ape": "position_bias", "ffn": "mlp", "bias": "e_score_correction_bias", "w1": "gate_proj", "w2": "down_proj",
    "w3": "up_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "hc_attn_fn": "attn_hc.fn",
    "hc_attn_base": "attn_hc.base", "hc_attn_scale": "attn_hc.scale", "hc_ffn_fn": "ffn_hc.fn",
    "hc_ffn_base": "ffn_hc.base", "hc_ffn_scale": "ffn_hc.scale", "hc_head_fn": "hc_head.hc_fn",
    "hc_head_base": "hc_head.hc_base", "hc_head_scale": "hc_head.hc_scale",
}  # fmt: skip
# Upstream's indexer owns a compressor; ours belongs to one. Applied in this order.
_MOVED = (
    ("self_attn.indexer.compressor.", "self_attn.compressor.indexer."),
    ("self_attn.indexer.", "self_attn.compressor.indexer."),
    ("indexer.weights_proj.", "indexer.scorer.weights_proj."),
)
_UPSTREAM_IN_LAYER = (
    "attn.attn_sink", "attn.wq_a.weight", "attn.q_norm.weight", "attn.wq_b.weight", "attn.wkv.weight",
    "attn.kv_norm.weight", "attn.wo_a.weight", "attn.wo_b.weight",
    "attn.compressor.ape", "attn.compressor.wkv.weight", "attn.compressor.wgate.weight", "attn.compressor.norm.weight",
    "attn.indexer.compressor.ape", "attn.indexer.compressor.wkv.weight", "attn.indexer.compressor.wgate.weight",
    "attn.indexer.compressor.norm.weight", "attn.indexer.wq_b.weight", "attn.indexer.weights_proj.weight",
    "ffn.gate.weight", "ffn.gate.tid2eid", "ffn.gate.bias",
    "ffn.shared_experts.w1.weight", "ffn.shared_experts.w3.weight", "ffn.shared_experts.w2.weight",
    "attn_norm.weight", "ffn_norm.weight",
    "hc_attn_fn", "hc_attn_base", "hc_attn_scale", "hc_ffn_fn", "hc_ffn_base", "hc_ffn_scale",
    "hc_head_fn", "hc_head_base", "hc_head_scale",  # of an MTP layer
)  # fmt: skip
_TOP_NAMES = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "hc_head_fn": "model.hc_head.hc_fn",
    "hc_head_base": "model.hc_head.hc_base",
    "hc_head_scale": "model.hc_head.hc_scale",
    "head.weight": "lm_head.weight",
}


def _translate(inside: str) -> str:
    """Our name for what a file calls `inside` within a layer; a no-op on our own names."""
    if inside == "norm.weight":  # an MTP layer's own; elsewhere the word means a compressor's norm
        return inside
    inside = ".".join(_PARTS.get(part, part) for part in inside.split("."))
    for theirs, ours in _MOVED:
        inside = inside.replace(theirs, ours)
    return inside


_UPSTREAM_OF_LAYER = {_translate(upstream): upstream for upstream in _UPSTREAM_IN_LAYER}
_UPSTREAM_OF_TOP = {ours: upstream for upstream, ours in _TOP_NAMES.items()}

_LAYER = re.compile(r"(layers|mtp)\.(\d+)\.(.+)")
_EXPERT = re.compile(r"(?:ffn|mlp)\.experts\.(\d+)\.(w[123]|gate_proj|up_proj|down_proj)\.weight")
_EXPERT_PARTS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
# What stands behind the name of a module, or of a stack of experts, when a tensor holds the scales of its weight.
_MODULE_SCALES = (".weight_scale_inv", ".weight_scale", ".scale")
_STACK_SCALES = ("_proj_scale_inv", "_proj_scale")


def tensor_specs(config: ModelConfig) -> dict[str, TensorInfo]:
    """Every tensor of the model in ``state_dict`` order, those of Engram included."""
    vocab, hidden, streams = config.vocab_size, config.hidden_size, config.hc_mult
    specs = {"model.embed_tokens.weight": TensorInfo((vocab, hidden), "weight")}
    for layer in range(config.num_hidden_layers):
        inside = _attention_specs(config, layer) | _mlp_specs(config, layer)
        inside |= {
            name: TensorInfo((hidden,), "fp32")
            for name in ("input_layernorm.weight", "post_attention_layernorm.weight")
        }
        for mixer in ("attn_hc", "ffn_hc"):
            outputs = (2 + streams) * streams
            inside[f"{mixer}.fn"] = TensorInfo((outputs, streams * hidden), "fp32")
            inside[f"{mixer}.base"] = TensorInfo((outputs,), "fp32")
            inside[f"{mixer}.scale"] = TensorInfo((3,), "fp32")
        if config.has_engram(layer):
            inside |= _engram_specs(config, layer)
        specs |= {f"model.layers.{layer}.{name}": info for name, info in inside.items()}
    specs["model.norm.weight"] = TensorInfo((hidden,), "fp32")
    specs["model.hc_head.hc_fn"] = TensorInfo((streams, streams * hidden), "fp32")
    specs["model.hc_head.hc_base"] = TensorInfo((streams,), "fp32")
    specs["model.hc_head.hc_scale"] = TensorInfo((1,), "fp32")
    if config.engram is not None:
        specs["model.engram_lookup"] = TensorInfo((vocab,), "int64")
    specs["lm_head.weight"] = TensorInfo((vocab, hidden), "weight")
    return specs


def _attention_specs(config: ModelConfig, layer: int) -> dict[str, TensorInfo]:
    hidden, heads, width = config.hidden_size, config.num_attention_heads, config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "sinks": (heads,),
        "q_a_proj.weight": (config.q_lora_rank, hidden),
        "q_a_norm.weight": (config.q_lora_rank,),
        "q_b_proj.weight": (heads * width, config.q_lora_rank),
        "kv_proj.weight": (width, hidden),
        "kv_norm.weight": (width,),
        "o_a_proj.weight": (config.o_groups * config.o_lora_rank, heads // config.o_groups * width),
        "o_b_proj.weight": (hidden, config.o_groups * config.o_lora_rank),
    }
    kind = config.attention_types[layer]
    if kind != "sliding":
        shapes |= _compressor_shapes("compressor.", config.ratio(layer), width, hidden, overlap=kind == "csa")
    if kind == "csa":
        index_width = config.index_head_dim
        shapes |= _compressor_shapes("compressor.indexer.", config.csa_ratio, index_width, hidden, overlap=True)
        shapes["compressor.indexer.q_b_proj.weight"] = (config.index_n_heads * index_width, config.q_lora_rank)
        shapes["compressor.indexer.scorer.weights_proj.weight"] = (config.index_n_heads, hidden)
    always_fp32 = ("sinks", "norm.weight", "position_bias")
    return {
        f"self_attn.{name}": TensorInfo(shape, "fp32" if name.endswith(always_fp32) else "weight")
        for name, shape in shapes.items()
    }


def _compressor_shapes(prefix: str, ratio: int, width: int, hidden: int, overlap: bool) -> dict[str, tuple[int, ...]]:
    """With overlap a token's row holds two halves: one for its own window, one for the next (paper, section 2.3.1)."""
    row = 2 * width if overlap else width
    return {
        f"{prefix}position_bias": (ratio, row),
        f"{prefix}kv_proj.weight": (row, hidden),
        f"{prefix}gate_proj.weight": (row, hidden),
        f"{prefix}kv_norm.weight": (width,),
    }


def _mlp_specs(config: ModelConfig, layer: int) -> dict[str, TensorInfo]:
    hidden, width, experts = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
    specs = {"mlp.gate.weight": TensorInfo((experts, hidden), "weight")}
    if config.mlp_types[layer] == "hash":
        specs["mlp.gate.tid2eid"] = TensorInfo((config.vocab_size, config.num_experts_per_tok), "int64")
    else:
        specs["mlp.gate.e_score_correction_bias"] = TensorInfo((experts,), "fp32")
    specs["mlp.experts.gate_up_proj"] = TensorInfo((experts, 2 * width, hidden), "weight")
    specs["mlp.experts.down_proj"] = TensorInfo((experts, hidden, width), "weight")
    for name in ("gate_proj", "up_proj"):
        specs[f"mlp.shared_experts.{name}.weight"] = TensorInfo((width, hidden), "weight")
    specs["mlp.shared_experts.down_proj.weight"] = TensorInfo((hidden, width), "weight")
    return specs


def _engram_specs(config: ModelConfig, layer: int) -> dict[str, TensorInfo]:
    engram = config.engram
    assert engram is not None
    hidden, streams = config.hidden_size, config.hc_mult
    addresses = engram.num_addresses
    return {
        "engram.embedding.weight": TensorInfo((engram.table_size(layer), engram.embed_dim), "weight"),
        "engram.key_proj.weight": TensorInfo((streams * hidden, engram.embedding_width), "weight"),
        "engram.value_proj.weight": TensorInfo((hidden, engram.embedding_width), "weight"),
        "engram.key_norm.weight": TensorInfo((streams, hidden), "fp32"),
        "engram.stream_norm.weight": TensorInfo((streams, hidden), "fp32"),
        "engram.conv_norm.weight": TensorInfo((streams, hidden), "fp32"),
        "engram.conv.weight": TensorInfo((streams * hidden, engram.kernel_size), "weight"),
        "engram.multipliers": TensorInfo((engram.max_ngram,), "int64"),
        "engram.primes": TensorInfo((addresses,), "int64"),
        "engram.offsets": TensorInfo((addresses,), "int64"),
    }


def sources(config: ModelConfig, name: str) -> Source:
    """The upstream tensors that make up the tensor `name` (a key of `tensor_specs`).

    Engram tensors keep their name: upstream V4 has none.
    """
    if name in _UPSTREAM_OF_TOP:
        return Source((_UPSTREAM_OF_TOP[name],), "copy")
    match = _LAYER.search(name)
    if match is None:
        return Source((name,), "copy")
    prefix, inside = f"{match[1]}.{match[2]}.", match[3]
    if inside in ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"):
        parts, join = expert_parts(name)
        experts = range(config.n_routed_experts)
        return Source(tuple(f"{prefix}ffn.experts.{e}.{part}.weight" for e in experts for part in parts), join)
    upstream = _UPSTREAM_OF_LAYER.get(inside)
    return Source((name if upstream is None else prefix + upstream,), "copy")


def expert_parts(name: str) -> tuple[tuple[str, ...], Join]:
    """Upstream's part names per expert for the stacked tensor `name`, and how they join; none if it is not stacked."""
    if name.endswith("mlp.experts.gate_up_proj"):
        return ("w1", "w3"), "stack_gate_up"
    if name.endswith("mlp.experts.down_proj"):
        return ("w2",), "stack"
    return (), "copy"


def expert_piece(stack: str, expert: int, part: str) -> str:
    """Canonical name of one expert's matrix out of the stacked tensor `stack`, as ``save_pretrained`` spells it."""
    layer = stack[: stack.index("mlp.experts.")]
    return f"{layer}ffn.experts.{expert}.{part}.weight"


def canonical(name: str) -> str:
    """Our name for the tensor that a file calls `name`; one expert's matrix becomes its `expert_piece`.

    A name that follows no known spelling comes back as it is. Tensors of MTP layers keep the prefix ``mtp.N.``.
    """
    body = name.removeprefix("model.")
    match = _LAYER.fullmatch(body)
    if match is None:
        return _TOP_NAMES.get(body, name)
    prefix = f"{'model.' if match[1] == 'layers' else ''}{match[1]}.{int(match[2])}."
    expert = _EXPERT.fullmatch(match[3])
    if expert is not None:
        return f"{prefix}ffn.experts.{int(expert[1])}.{_EXPERT_PARTS.get(expert[2], expert[2])}.weight"
    return prefix + _translate(match[3])


def scaled_weight(name: str) -> str | None:
    """Canonical name of the weight whose block scales the file's tensor `name` holds; None for any other tensor.

    Upstream calls the scales of ``X.weight`` ``X.scale``, Hugging Face ``X.weight_scale_inv`` (and those of a stack of
    experts ``gate_up_proj_scale_inv``).
    """
    if name.endswith("_hc.scale"):
        return None
    for suffix in _MODULE_SCALES:
        if name.endswith(suffix):
            return canonical(name.removesuffix(suffix) + ".weight")
    for suffix in _STACK_SCALES:
        if name.endswith(suffix):
            return canonical(name.removesuffix(suffix) + "_proj")
    return None


def is_mtp(config: ModelConfig, name: str) -> bool:
    """Whether a file's tensor belongs to the multi-token-prediction layers, which follow the model's."""
    body = name.removeprefix("model.")
    if body.startswith("mtp"):
        return True
    match = _LAYER.fullmatch(body)
    return match is not None and int(match[2]) >= config.num_hidden_layers


def mtp_specs(config: ModelConfig) -> dict[str, TensorInfo]:
    """Every tensor of the published MTP layers, by its canonical name.

    Each is a sliding layer with score routing, behind two projections that join the next token's embedding and the
    streams, and before an mHC head and a norm of its own; embedding and output projection are the model's.
    """
    every = tensor_specs(config.mtp_layer())
    layer = {name: info for name, info in every.items() if name.startswith("model.layers.0.")}
    hidden, streams = config.hidden_size, config.hc_mult
    own = {f"{name}.weight": TensorInfo((hidden, hidden), "weight") for name in ("e_proj", "h_proj")}
    own |= {f"{name}.weight": TensorInfo((hidden,), "fp32") for name in ("enorm", "hnorm", "norm")}
    own["hc_head.hc_fn"] = TensorInfo((streams, streams * hidden), "fp32")
    own["hc_head.hc_base"] = TensorInfo((streams,), "fp32")
    own["hc_head.hc_scale"] = TensorInfo((1,), "fp32")
    inside = {name.removeprefix("model.layers.0."): info for name, info in layer.items()} | own
    layers = range(config.num_nextn_predict_layers)
    return {f"mtp.{depth}.{name}": info for depth in layers for name, info in inside.items()}
