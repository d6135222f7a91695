"""The compile driver: a checkpoint or an ONNX file in, an artifact out.

The graph is imported three times - chunks of tokens, chunks with the logits of every token, a single token of a single
row - into one module with shared kernels; the target builds it; then weights are packed and written slice by slice
(`weight_packing`).
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Collection
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from v4c import inspection, targets
from v4c.frontend.config import ModelConfig
from v4c.frontend.model.caches import CacheSpec, model_caches
from v4c.frontend.model.model import WeightSource
from v4c.frontend.onnx_export import add_heads, build, cache_shape, set_head
from v4c.onnx_source import OnnxSource
from v4c.passes.dump import Dump
from v4c.passes.onnx.rewriting import PassReport
from v4c.passes.pipeline import PACK_WEIGHTS, SHARE_LAYERS, SPECIALISE_DECODE, PassOptions, run_onnx_passes
from v4c.passes.relax.importer import Importer
from v4c.passes.relax.layouts import Storage, WeightSpec
from v4c.progress import Progress
from v4c.runtime import manifest as artifact
from v4c.runtime.library import choose_threads
from v4c.runtime.shards import plan_shards
from v4c.runtime.writer import SHARD_BYTES, ArtifactWriter
from v4c.targets.base import Simulated, StorageChecks, Target
from v4c.weight_packing import pack_weights, peak_bytes, resume_key

if TYPE_CHECKING:
    from v4c.targets.ascend.tile_database import TileDatabase
    from v4c.targets.cpu.tuning_database import TuningDatabase

DTYPES = {"f32": "float32", "bf16": "bfloat16"}


def storage_of(dtype: str, quant: str) -> Storage:
    """What weights are stored as for options ``--dtype`` and ``--quant``."""
    return Storage(DTYPES[dtype], DTYPES[dtype] if quant == "none" else quant)


def compile_model(
    source: WeightSource | ModelConfig | OnnxSource,
    destination: Path,
    *,
    target: str,
    storage: Storage,
    weights: bool,
    disable_passes: Collection[str] = (),
    dump_ir: Path | None = None,
    tuning: TuningDatabase | TileDatabase | None = None,
    strict: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Compile `source` for `target` into the artifact folder `destination`; see `v4c.compile`."""
    return compile_for(
        targets.find(target, tuning, strict, progress), source, destination, storage=storage, weights=weights,
        disable_passes=disable_passes, dump_ir=dump_ir, progress=progress,
    )  # fmt: skip


def compile_for(
    device: Target,
    source: WeightSource | ModelConfig | OnnxSource,
    destination: Path,
    *,
    storage: Storage,
    weights: bool,
    disable_passes: Collection[str] = (),
    dump_ir: Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """As `compile_model`, for a target that has been found."""
    disable_passes, storage = settings(device, disable_passes, storage)
    options = PassOptions.checked(disable_passes, None if dump_ir is None else Dump(dump_ir))
    with ArtifactWriter(destination) as writer, tempfile.TemporaryDirectory() as scratch:
        model, config = graph(source, options, storage, progress)
        module, specs = lower(model, device, storage, options)
        if progress:
            progress("compile kernels", 0, 0)
        library = Path(scratch) / "model.so"
        kernels = device.build(module, library, options)
        writer.write_library(library)
        for name, content in (device.attachments if isinstance(device, Simulated) else {}).items():
            writer.attach(name, content)
        stored = weights and not isinstance(source, ModelConfig)
        packed = _packed(device, specs)
        key = resume_key(source, device, specs, packed) if stored else None
        writer.declare_weights(packed, stored, key, _checking(progress))
        if stored:
            pack_weights(writer, source, device, specs, packed, progress)
        tokenizer = getattr(source, "tokenizer_path", None)
        if tokenizer is not None:
            writer.copy_tokenizer(tokenizer)
        build_notes = {
            "tables": storage.tables, "disabled_passes": sorted(disable_passes), "kernels": kernels, **device.notes
        }  # fmt: skip
        writer.finish(_manifest(config, device, storage, build_notes, SPECIALISE_DECODE not in options.disabled))
    return destination


def plan(
    source: WeightSource | ModelConfig | OnnxSource,
    *,
    target: str,
    storage: Storage,
    disable_passes: Collection[str] = (),
    tuning: TuningDatabase | TileDatabase | None = None,
) -> dict[str, Any]:
    """What `compile_model` would write, without building or reading weights: the ``--dry-run`` report."""
    device = targets.find(target, tuning)
    disable_passes, storage = settings(device, disable_passes, storage)
    options = PassOptions.checked(disable_passes)
    model, config = graph(source, options, storage, None)
    _, specs = lower(model, device, storage, options)
    packed = _packed(device, specs)
    costs = inspection.costs(config)
    return {
        "target": device.name,
        "tensors": len(packed),
        "weight_bytes": sum(w.nbytes for w in packed),
        "largest_tensor_bytes": max(w.nbytes for w in packed),
        "artifact_bytes": sum(shard.nbytes for shard in plan_shards(packed, SHARD_BYTES)),
        "peak_memory_bytes": peak_bytes(device, specs),
        "flops_per_token": costs["flops_per_token"],
        "cache_bytes": costs["cache_bytes"],
        "caches": [
            {"name": c.path, "dtype": _cache_dtype(c, device), "shape": cache_shape(c)} for c in model_caches(config)
        ],
        **device.notes,
    }


def lower(model: ir.Model, device: Target, storage: Storage, options: PassOptions) -> tuple[Any, list[WeightSpec]]:
    """The Relax module with the entry points, and the weights they take, in order."""
    choose_threads()  # before TVM makes its workers: the artifact may be run in this same process
    _store_caches(model, device)
    importer = Importer(
        model, device.kernels, _weight_names(model), storage, share_layers=SHARE_LAYERS not in options.disabled,
        pack_weights=PACK_WEIGHTS not in options.disabled,
    )  # fmt: skip
    set_head(model, all_logits=False)
    prefill = importer.import_main("prefill")
    made = [prefill]
    if SPECIALISE_DECODE not in options.disabled:
        made.append(importer.import_main(artifact.DECODE_ONE, {"batch": 1, "chunk": 1}))
    set_head(model, all_logits=True)
    made.append(importer.import_main("prefill_all"))
    assert all(m.weights == prefill.weights for m in made)
    return importer.builder.finalize(), prefill.weights


def settings(device: Target, disable_passes: Collection[str], storage: Storage) -> tuple[Collection[str], Storage]:
    """Passes to leave out and storage of weights: what was asked, and what the target's kernels need."""
    if isinstance(device, StorageChecks):
        device.check_storage(storage)
    if not isinstance(device, Simulated):
        return disable_passes, storage
    return [*dict.fromkeys((*disable_passes, *device.without_passes))], device.storage(storage)


def _cache_dtype(cache: CacheSpec, device: Target) -> str:
    """What a cache is stored as."""
    own = device.cache_dtypes if isinstance(device, Simulated) else {}
    return own.get(cache.path.rpartition(".")[2], cache.dtype)


def _store_caches(model: ir.Model, device: Target) -> None:
    """Give the graph's caches the dtypes of the target's kernels; types within follow at import."""
    if not isinstance(device, Simulated):
        return
    for value in model.graph.inputs:
        dtype = device.cache_dtypes.get(str(value.name).rpartition(".")[2])
        if dtype is not None and str(value.name).startswith("past."):
            value.dtype = ir.DataType[dtype.upper()]


def _weight_names(model: ir.Model) -> frozenset[str]:
    return frozenset(json.loads(model.metadata_props["v4c.weights"]))


def _checking(progress: Progress | None) -> Callable[[int, int], None] | None:
    """Progress over what an earlier, killed compilation left."""
    return None if progress is None else lambda done, total: progress("check packed weights", done, total)


def _tell(report: PassReport, progress: Progress | None) -> None:
    """Report a pass as progress: places rewritten, and each place left alone with the reason."""
    if progress:
        progress(f"{report.name}: {report.rewritten} places", 0, 0)
        for refusal in report.refusals:
            progress(f"{report.name}: left alone {refusal}", 0, 0)


def graph(
    source: WeightSource | ModelConfig | OnnxSource, options: PassOptions, storage: Storage, progress: Progress | None
) -> tuple[ir.Model, ModelConfig]:
    """The ONNX graph of `source`, its passes done, and its config."""
    config = source if isinstance(source, ModelConfig) else source.config
    model = source.model if isinstance(source, OnnxSource) else build(config, progress=progress)
    add_heads(model, config)
    for report in run_onnx_passes(model, options, _weight_names(model), storage.products):
        _tell(report, progress)
    return model, config


def _packed(device: Target, weights: list[WeightSpec]) -> list[artifact.WeightSpec]:
    """The weights as the artifact stores them."""
    specs = [device.kernels.packed(w) for w in weights]
    return [artifact.WeightSpec(w.name, s.dtype, tuple(s.shape)) for w, s in zip(weights, specs, strict=True)]


def _manifest(
    config: ModelConfig, device: Target, storage: Storage, notes: dict[str, Any], decode_one: bool
) -> artifact.Manifest:
    # A step of several rows is a chunk of one token: the same function.
    entry_points = {"prefill": "prefill", "prefill_all": "prefill_all", "decode": "prefill"}
    if decode_one:
        entry_points[artifact.DECODE_ONE] = artifact.DECODE_ONE
    return artifact.Manifest(
        v4c_version=version("v4c"),
        tvm_version=version("apache-tvm"),
        target=artifact.Target(device.name, os.uname().machine, device.features),
        dtypes=artifact.DTypes(storage.products, "float32", _main_cache_dtype(config, device)),
        config=config.to_dict(),
        vocab_size=config.vocab_size,
        max_context=config.max_position_embeddings,
        eos_token_ids=config.eos_token_ids,
        caches=tuple(artifact.CacheSpec(c.path, _cache_dtype(c, device), _dims(c)) for c in model_caches(config)),
        entry_points=entry_points,
        build=notes,
        plan=device.plan_file if isinstance(device, Simulated) else None,
    )


def _main_cache_dtype(config: ModelConfig, device: Target) -> str:
    return _cache_dtype(next(c for c in model_caches(config) if c.path.endswith(".window")), device)


def _dims(spec: CacheSpec) -> tuple[artifact.Dim, ...]:
    rows: artifact.Dim = artifact.Rows(spec.ratio) if spec.ratio else spec.rows
    return ("batch", rows) if spec.width is None else ("batch", rows, spec.width)
