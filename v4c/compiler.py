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
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from v4c import inspection, targets
from v4c.errors import UnsupportedError
from v4c.frontend.config import ModelConfig
from v4c.frontend.model.caches import CacheSpec, model_caches
from v4c.frontend.model.model import WeightSource
from v4c.frontend.model.mtp import mtp_caches
from v4c.frontend.mtp_graph import build_mtp
from v4c.frontend.onnx_export import add_heads, add_streams, build, cache_shape, set_head
from v4c.onnx_source import OnnxSource
from v4c.passes.dump import Dump
from v4c.passes.onnx.hoisting import STORED
from v4c.passes.onnx.rewriting import PassReport
from v4c.passes.pipeline import PACK_WEIGHTS, SHARE_LAYERS, SPECIALISE_DECODE, PassOptions, run_onnx_passes
from v4c.passes.relax.importer import Importer
from v4c.passes.relax.layouts import CacheFormat, Storage, WeightSpec
from v4c.progress import Progress
from v4c.runtime import cache_specs
from v4c.runtime import manifest as artifact
from v4c.runtime.library import choose_threads
from v4c.runtime.shards import plan_shards
from v4c.runtime.writer import SHARD_BYTES, ArtifactWriter
from v4c.stored_formats import stored_formats
from v4c.targets.base import HostTables, Simulated, StorageChecks, Target
from v4c.weight_packing import pack_weights, peak_bytes, resume_key

if TYPE_CHECKING:
    from v4c.targets.ascend.tile_database import TileDatabase
    from v4c.targets.tuning_database import TuningDatabase

DTYPES = {"f32": "float32", "bf16": "bfloat16"}
KV_FORMATS: tuple[CacheFormat, ...] = ("f32", "bf16", "fp8")
_ONNX_DTYPES = {"float32": "FLOAT", "bfloat16": "BFLOAT16", "uint8": "UINT8", "int64": "INT64"}


def storage_of(dtype: str, quant: str, kv: CacheFormat = "f32", activations: str = "f32") -> Storage:
    """What is stored as what for options ``--dtype``, ``--quant``, ``--kv`` and ``--activations``.

    Raises:
        UnsupportedError: bfloat16 rows for matrices that are not bfloat16.
    """
    if activations != "f32" and (dtype, quant) != ("bf16", "none"):
        raise UnsupportedError(f"activations {activations}: expected dtype bf16 and quant none, found {dtype}, {quant}")
    if quant == "native":
        return Storage(quant, quant, kv)
    return Storage(DTYPES[dtype], DTYPES[dtype] if quant == "none" else quant, kv, DTYPES[activations])


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
    mtp: bool = True,
    progress: Progress | None = None,
) -> Path:
    """Compile `source` for `target` into the artifact folder `destination`; see `v4c.compile`."""
    return compile_for(
        targets.find(target, tuning, strict, progress), source, destination, storage=storage, weights=weights,
        disable_passes=disable_passes, dump_ir=dump_ir, mtp=mtp, progress=progress,
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
    mtp: bool = True,
    progress: Progress | None = None,
) -> Path:
    """As `compile_model`, for a target that has been found."""
    disable_passes, storage = settings(device, disable_passes, storage)
    options = PassOptions.checked(disable_passes, None if dump_ir is None else Dump(dump_ir))
    with ArtifactWriter(destination) as writer, tempfile.TemporaryDirectory() as scratch:
        model, config = graph(source, options, storage, progress)
        ahead = mtp_graph(source, options, storage, progress) if mtp and has_mtp(source, device) else None
        module, specs, drafting = lower(model, device, storage, options, ahead)
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
        decode_one = SPECIALISE_DECODE not in options.disabled
        writer.finish(_manifest(config, device, storage, build_notes, decode_one, drafting))
    return destination


def plan(
    source: WeightSource | ModelConfig | OnnxSource,
    *,
    target: str,
    storage: Storage,
    disable_passes: Collection[str] = (),
    tuning: TuningDatabase | TileDatabase | None = None,
    mtp: bool = True,
) -> dict[str, Any]:
    """What `compile_model` would write, without building or reading weights: the ``--dry-run`` report."""
    device = targets.find(target, tuning)
    disable_passes, storage = settings(device, disable_passes, storage)
    options = PassOptions.checked(disable_passes)
    model, config = graph(source, options, storage, None)
    ahead = mtp_graph(source, options, storage, None) if mtp and has_mtp(source, device) else None
    _, specs, _ = lower(model, device, storage, options, ahead)
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
            {"name": c.path, "dtype": _cache_dtype(c, device), "shape": cache_shape(c)}
            for c in model_caches(config, storage.kv)
        ],
        **device.notes,
    }


def lower(
    model: ir.Model, device: Target, storage: Storage, options: PassOptions, mtp: ir.Model | None = None
) -> tuple[Any, list[WeightSpec], artifact.MTP | None]:
    """The Relax module with the entry points, the weights they take, in order, and what the MTP layer's take of them.

    With `mtp`, the graph of the MTP layer, there are further entry points, and weights that only they take come last.
    """
    choose_threads()  # before TVM makes its workers: the artifact may be run in this same process
    _store_caches(model, device, storage)
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
    if mtp is not None:
        add_streams(model)
        made.append(importer.import_main(artifact.VERIFY))
        set_head(model, all_logits=False)
        made.append(importer.import_main(artifact.PREFILL_STREAMS))
    assert all(m.weights == prefill.weights for m in made)
    if mtp is None:
        return importer.builder.finalize(), prefill.weights, None
    draft = importer.beside(mtp, _weight_names(mtp)).import_main(artifact.DRAFT)
    own = [w for w in draft.weights if w not in prefill.weights]
    names = [w.name for w in prefill.weights + own]
    assert len(set(names)) == len(names), "a weight that both graphs read must be packed alike"
    described = artifact.MTP((), tuple(w.name for w in draft.weights), tuple(w.name for w in own))
    return importer.builder.finalize(), prefill.weights + own, described


def has_mtp(source: Any, device: Target) -> bool:
    """Whether the artifact can guess tokens ahead: the checkpoint holds the MTP layer whole, the device is real."""
    return bool(getattr(source, "mtp_specs", None)) and not isinstance(device, Simulated)


def mtp_graph(source: Any, options: PassOptions, storage: Storage, progress: Progress | None) -> ir.Model:
    """The ONNX graph of the MTP layer of `source`, its passes done."""
    if progress:
        progress("trace the MTP layer", 0, 0)
    model = build_mtp(source.config)
    _mark_stored(model, source, storage)
    for report in run_onnx_passes(model, PassOptions(options.disabled), _weight_names(model), storage.products):
        _tell(report, progress)
    return model


def settings(device: Target, disable_passes: Collection[str], storage: Storage) -> tuple[Collection[str], Storage]:
    """Passes to leave out and storage of weights: what was asked, and what the target's kernels need."""
    if isinstance(device, StorageChecks):
        device.check_storage(storage)
    if not isinstance(device, Simulated):
        return disable_passes, storage
    if storage.kv != "f32":
        raise UnsupportedError(f"kv {storage.kv!r}: expected f32 for target {device.name}: its caches are float16")
    if storage.activations != "float32":
        raise UnsupportedError(f"activations bf16: expected f32 for target {device.name}, whose weights decide it")
    return [*dict.fromkeys((*disable_passes, *device.without_passes))], device.storage(storage)


def _cache_dtype(cache: CacheSpec, device: Target) -> str:
    """What a cache is stored as."""
    own = device.cache_dtypes if isinstance(device, Simulated) else {}
    return own.get(cache.path.rpartition(".")[2], cache.dtype)


def _store_caches(model: ir.Model, device: Target, storage: Storage) -> None:
    """Give the graph's caches the dtypes of the target's kernels; types within follow at import."""
    if not isinstance(device, Simulated):
        config = ModelConfig.from_dict(json.loads(model.metadata_props["v4c.config"]), "v4c.config")
        inputs = {str(value.name): value for value in model.graph.inputs}
        for cache in model_caches(config, storage.kv):
            value = inputs[f"past.{cache.path}"]
            value.dtype = ir.DataType[_ONNX_DTYPES[cache.dtype]]
            if cache.width is not None:
                assert value.shape is not None
                value.shape = ir.Shape([*list(value.shape)[:-1], cache.width])
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
    _mark_stored(model, source, storage)
    for report in run_onnx_passes(model, options, _weight_names(model), storage.products):
        _tell(report, progress)
    return model, config


def _mark_stored(model: ir.Model, source: Any, storage: Storage) -> None:
    """Say of each weight what the checkpoint has it in, where that is what is to be packed."""
    if storage.products == "native":
        stored = stored_formats(source)
        for value in (*model.graph.inputs, *model.graph.initializers.values()):
            if str(value.name) in stored:
                value.metadata_props[STORED] = stored[str(value.name)]


def _packed(device: Target, weights: list[WeightSpec]) -> list[artifact.WeightSpec]:
    """The weights as the artifact stores them."""
    specs = [device.kernels.packed(w) for w in weights]
    on_host = [isinstance(device, HostTables) and device.on_host(w) for w in weights]
    return [
        artifact.WeightSpec(w.name, s.dtype, tuple(s.shape), on_host=host)
        for w, s, host in zip(weights, specs, on_host, strict=True)
    ]


def _manifest(
    config: ModelConfig,
    device: Target,
    storage: Storage,
    notes: dict[str, Any],
    decode_one: bool,
    mtp: artifact.MTP | None,
) -> artifact.Manifest:
    # A step of several rows is a chunk of one token: the same function.
    entry_points = {"prefill": "prefill", "prefill_all": "prefill_all", "decode": "prefill"}
    if decode_one:
        entry_points[artifact.DECODE_ONE] = artifact.DECODE_ONE
    if mtp is not None:
        mtp = replace(mtp, caches=_stored_caches(mtp_caches(config), device))
    return artifact.Manifest(
        v4c_version=version("v4c"),
        tvm_version=version("apache-tvm"),
        target=artifact.Target(device.name, os.uname().machine, device.features),
        dtypes=artifact.DTypes(storage.products, storage.activations, _main_cache_dtype(config, device, storage)),
        config=config.to_dict(),
        vocab_size=config.vocab_size,
        max_context=config.max_position_embeddings,
        eos_token_ids=config.eos_token_ids,
        caches=_stored_caches(model_caches(config, storage.kv), device),
        entry_points=entry_points,
        mtp=mtp,
        build=notes,
        plan=device.plan_file if isinstance(device, Simulated) else None,
    )


def _stored_caches(caches: list[CacheSpec], device: Target) -> tuple[cache_specs.CacheSpec, ...]:
    return tuple(cache_specs.CacheSpec(c.path, _cache_dtype(c, device), _dims(c)) for c in caches)


def _main_cache_dtype(config: ModelConfig, device: Target, storage: Storage) -> str:
    if storage.kv != "f32":
        return {"bf16": "bfloat16"}.get(storage.kv, storage.kv)
    return _cache_dtype(next(c for c in model_caches(config) if c.path.endswith(".window")), device)


def _dims(spec: CacheSpec) -> tuple[cache_specs.Dim, ...]:
    rows: cache_specs.Dim = cache_specs.Rows(spec.ratio) if spec.ratio else spec.rows
    return ("batch", rows) if spec.width is None else ("batch", rows, spec.width)
