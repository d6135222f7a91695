"""What a checkpoint folder, an ONNX file, an artifact or a dump of passes holds: contents, bytes, what a token costs.

Only headers, graphs and manifests are read, never weights, so it takes no longer on a terabyte than on a megabyte.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from v4c.errors import Error, InputError

if TYPE_CHECKING:
    from v4c.frontend.config import ModelConfig
    from v4c.runtime.manifest import Manifest

__all__ = ["CONTEXTS", "costs", "inspect", "inspect_preset"]

CONTEXTS = (4096, 131072, 1048576)
"""Context lengths at which a token's FLOPs and a sequence's cache are given: 4k, 128k and 1M."""

# What a tensor belongs to, by the first of these its canonical name contains.
_PARTS = (
    ("embed_tokens.", "embedding"),
    ("lm_head.", "output projection"),
    ("engram", "engram"),
    (".shared_experts.", "shared expert"),
    (".experts.", "routed experts"),
    (".mlp.gate.", "router"),
    (".indexer.", "indexer"),
    (".compressor.", "compressor"),
    (".self_attn.", "attention"),
    ("_hc.", "hyper-connections"),
    (".hc_head.", "hyper-connections"),
    ("norm.", "norms"),
)


def inspect(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Describe a checkpoint folder, an ONNX or MLIR file, an artifact folder, or a folder that ``--dump-ir`` filled.

    Returns:
        JSON-able. Always ``kind`` (``"checkpoint"``, ``"onnx"``, ``"mlir"``, ``"artifact"``, ``"dump"``), ``path``, and
        ``problem``: a line on what keeps v4c from using it, or None. Where the config is known also ``config`` and
        ``costs`` (see `costs`). Of a dump: ``context``, and per stage in ``stages`` the nodes, and of one decode step
        at that context the kernel launches (whole step, and of one run of each function), bytes moved and FLOPs.

    Raises:
        InputError: there is nothing at `path`.
        Error: what is there cannot be read; the message names the file.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: expected a checkpoint, an ONNX file, an artifact or a dump, found nothing")
    if path.is_file():
        return _mlir_file(path) if path.suffix == ".mlir" else _onnx_file(path)
    from v4c.passes.summary import SUMMARY, read_summary

    if (path / SUMMARY).exists():
        return {"kind": "dump", "path": str(path), "problem": None, **read_summary(path)}
    return _artifact(path) if (path / "manifest.json").exists() else _checkpoint(path)


def inspect_preset(name: str) -> dict[str, Any]:
    """Describe a known size as `inspect` describes files: what a checkpoint of it and artifacts from it take.

    Returns:
        ``kind`` (``"preset"``), ``path`` (its name), ``problem`` (None), ``config``, ``costs``; ``tensors`` and
        ``bytes_by_part`` of a published checkpoint, MTP layers included; ``weight_bytes`` by storage, and for each
        storage of `v4c.compile` about how large the artifact (``artifact_bytes``) and the memory that packing takes
        (``peak_memory_bytes``) are.

    Raises:
        ConfigError: no such preset.
    """
    from v4c.frontend import estimate
    from v4c.frontend.names import mtp_specs, sources, tensor_specs
    from v4c.frontend.native_layout import native_bytes, native_format
    from v4c.frontend.presets import preset
    from v4c.packing_memory import peak_bytes_of

    config = preset(name)
    specs, extra = tensor_specs(config), mtp_specs(config)
    parts: Counter[str] = Counter()
    tensors = 0
    for tensor, info in (specs | extra).items():
        parts["MTP layers" if tensor in extra else part_of(tensor)] += native_bytes(tensor, info)
        scaled = native_format(tensor, info) in ("fp8", "fp4")
        tensors += len(sources(config, tensor).pieces) * (2 if scaled else 1)
    formats: tuple[estimate.WeightDtype, ...] = ("native", "f32", "bf16", "f16")
    weight_bytes = {dtype: estimate.weight_bytes(config, dtype) for dtype in formats}
    return {
        "kind": "preset",
        "path": name,
        "problem": None,
        **_model(config),
        "tensors": tensors,
        "bytes": parts.total(),
        "bytes_by_part": dict(parts),
        "weight_bytes": weight_bytes,
        "artifact_bytes": {dtype: weight_bytes[dtype] for dtype in ("f32", "bf16")},
        "peak_memory_bytes": peak_bytes_of(config),
    }


def costs(config: ModelConfig) -> dict[str, Any]:
    """Parameters, active parameters, and per context of `CONTEXTS` the FLOPs of a token and the bytes of the caches.

    ``against_v32`` gives FLOPs and cache as shares of DeepSeek-V3.2's at 1M (`v4c.frontend.v32`).
    """
    from v4c.frontend import estimate
    from v4c.frontend.v32 import against_v32

    formats: tuple[estimate.CacheDtype, ...] = ("f32", "bf16", "fp8")
    return {
        "parameters": estimate.parameters(config),
        "active_parameters": estimate.active_parameters(config),
        "flops_per_token": {str(context): estimate.flops_per_token(config, context) for context in CONTEXTS},
        "cache_bytes": {
            kv: {str(context): estimate.cache_bytes(config, context, kv) for context in CONTEXTS} for kv in formats
        },
        "cache_bytes_per_token": estimate.cache_bytes_per_token(config),
        "against_v32": against_v32(config),
    }


def _model(config: ModelConfig) -> dict[str, Any]:
    """The keys every description of a model shares."""
    summary = {
        "layers": config.num_hidden_layers,
        "attention": dict(Counter(config.attention_types)),
        "router": dict(Counter(config.mlp_types)),
        "hidden_size": config.hidden_size,
        "heads": config.num_attention_heads,
        "head_dim": config.head_dim,
        "experts": config.n_routed_experts,
        "experts_per_token": config.num_experts_per_tok,
        "vocab_size": config.vocab_size,
        "max_context": config.max_position_embeddings,
        "engram_layers": list(config.engram.layer_ids) if config.engram is not None else [],
        "dtype": config.dtype,
    }
    return {"config": summary, "costs": costs(config)}


def _checkpoint(folder: Path) -> dict[str, Any]:
    from v4c.frontend.checkpoint import SINGLE_FILE, Checkpoint
    from v4c.frontend.names import canonical, is_mtp
    from v4c.frontend.safetensors_reader import read_header

    checkpoint = Checkpoint.open(folder)
    try:
        checkpoint.check()
        problem = None
    except Error as error:
        problem = str(error)
    single = folder / SINGLE_FILE
    files = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    tensors = [tensor for file in files for tensor in read_header(file).values()]
    parts: Counter[str] = Counter()
    dtypes: Counter[str] = Counter()
    for tensor in tensors:
        mtp = is_mtp(checkpoint.config, tensor.name)
        parts["MTP layers" if mtp else part_of(canonical(tensor.name))] += tensor.nbytes
        dtypes[tensor.dtype] += tensor.nbytes
    return {
        "kind": "checkpoint",
        "path": str(folder),
        "problem": problem,
        **_model(checkpoint.config),
        "files": {file.name: file.stat().st_size for file in files},
        "tensors": len(tensors),
        "bytes": sum(dtypes.values()),
        "bytes_by_part": dict(parts),
        "bytes_by_dtype": dict(dtypes),
        "unused_tensors": checkpoint.unused,
        "tokenizer": checkpoint.tokenizer_path is not None,
    }


def part_of(name: str) -> str:
    """Which part of a model the tensor of this canonical name belongs to."""
    name = name.replace(".ffn.", ".mlp.")  # single experts are spelled so
    return next((part for fragment, part in _PARTS if fragment in name), "other")


def _onnx_file(path: Path) -> dict[str, Any]:
    from v4c.frontend.config import ModelConfig
    from v4c.inspection_onnx import describe

    described, config = describe(path)
    model = _model(ModelConfig.from_dict(config, f"{path}: v4c.config")) if config is not None else {}
    return {"kind": "onnx", "path": str(path), **model, **described}


def _mlir_file(path: Path) -> dict[str, Any]:
    from v4c.frontend.config import ModelConfig
    from v4c.inspection_mlir import describe

    described, config = describe(path)
    model = _model(ModelConfig.from_dict(config, f"{path}: v4c.config")) if config is not None else {}
    return {"kind": "mlir", "path": str(path), **model, **described}


def _artifact(folder: Path) -> dict[str, Any]:
    from v4c.frontend.config import ModelConfig
    from v4c.runtime.artifact import read_manifest

    manifest = read_manifest(folder)
    document = json.loads(manifest.to_json())
    weights: Counter[str] = Counter()
    for weight in manifest.weights:
        weights[weight.dtype] += weight.nbytes
    return {
        "kind": "artifact",
        "path": str(folder),
        "problem": _damage(folder, {name: stored.size for name, stored in manifest.files.items()}),
        **_model(ModelConfig.from_dict(dict(manifest.config), f"{folder}: config")),
        **{key: document[key] for key in ("format_version", "v4c_version", "tvm_version", "target", "dtypes", "build")},
        "max_context": manifest.max_context,
        "files": {name: stored.size for name, stored in manifest.files.items()},
        "entry_points": dict(manifest.entry_points),
        "caches": document["caches"],
        "has_weights": manifest.has_weights,
        "tensors": len(manifest.weights),
        "bytes": sum(weights.values()),
        "bytes_by_dtype": dict(weights),
        "host_tables": {weight.name: weight.nbytes for weight in manifest.weights if weight.on_host},
        "tokenizer": manifest.tokenizer is not None,
        "mtp": manifest.mtp is not None,
        **_plan(folder, manifest),
    }


def _plan(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """Of an artifact that simulates a device: its launch plan in numbers, and what it costs at the device's peaks."""
    if manifest.plan is None or not (folder / manifest.plan).is_file():
        return {}
    from v4c.targets.ascend.report import describe, read_plan

    return {"plan": describe(read_plan(folder / manifest.plan), manifest.entry_points)}


def _damage(folder: Path, sizes: dict[str, int]) -> str | None:
    for name, size in sizes.items():
        file = folder / name
        found = f"{file.stat().st_size}" if file.is_file() else "no such file"
        if found != str(size):
            return f"{file}: expected {size} bytes, found {found}"
    return None
