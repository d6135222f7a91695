"""The compile driver: a checkpoint or an ONNX file in, an artifact out.

The graph is imported three times - chunks of tokens, chunks with the logits of every token, a single token of a single
row - into one module with shared kernels; the target builds it; then weights are packed and written one by one.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Collection
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from v4c import targets
from v4c.errors import CheckpointError, UnsupportedError
from v4c.frontend.config import ModelConfig
from v4c.frontend.model.caches import CacheSpec, model_caches
from v4c.frontend.model.model import WeightSource
from v4c.frontend.onnx_export import add_heads, build, cache_shape, set_head
from v4c.passes.dump import Dump
from v4c.passes.onnx.rewriting import PassReport
from v4c.passes.pipeline import PACK_WEIGHTS, SHARE_LAYERS, SPECIALISE_DECODE, PassOptions, run_onnx_passes
from v4c.passes.relax.importer import Importer
from v4c.passes.relax.layouts import Storage, WeightSpec
from v4c.progress import Progress
from v4c.runtime import manifest as artifact
from v4c.runtime.library import choose_threads
from v4c.runtime.writer import ArtifactWriter
from v4c.targets import Target

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
    progress: Progress | None = None,
) -> Path:
    """Compile `source` for `target` into the artifact folder `destination`; see `v4c.compile`."""
    device = targets.find(target)
    options = PassOptions.checked(disable_passes, None if dump_ir is None else Dump(dump_ir))
    with ArtifactWriter(destination) as writer, tempfile.TemporaryDirectory() as scratch:
        model, config = _graph(source, options, storage, progress)
        module, specs = lower(model, device, storage, options)
        if progress:
            progress("compile kernels", 0, 0)
        library = Path(scratch) / "model.so"
        kernels = device.build(module, library, options)
        writer.write_library(library)
        stored = weights and not isinstance(source, ModelConfig)
        packed = _packed(device, specs)
        writer.declare_weights(packed, stored=stored)
        if stored:
            assert not isinstance(source, ModelConfig)
            _write_weights(writer, source, device, specs, packed, progress)
        tokenizer = getattr(source, "tokenizer_path", None)
        if tokenizer is not None:
            writer.copy_tokenizer(tokenizer)
        build_notes = {"tables": storage.tables, "disabled_passes": sorted(disable_passes), "kernels": kernels}
        writer.finish(_manifest(config, device, storage, build_notes, SPECIALISE_DECODE not in options.disabled))
    return destination


def plan(
    source: WeightSource | ModelConfig | OnnxSource,
    *,
    target: str,
    storage: Storage,
    disable_passes: Collection[str] = (),
) -> dict[str, Any]:
    """What `compile_model` would write, without building or reading weights: the ``--dry-run`` report."""
    device = targets.find(target)
    options = PassOptions.checked(disable_passes)
    model, config = _graph(source, options, storage, None)
    _, specs = lower(model, device, storage, options)
    packed = _packed(device, specs)
    return {
        "target": device.name,
        "tensors": len(packed),
        "weight_bytes": sum(w.nbytes for w in packed),
        "largest_tensor_bytes": max(w.nbytes for w in packed),
        "caches": [{"name": c.path, "dtype": c.dtype, "shape": cache_shape(c)} for c in model_caches(config)],
    }


def lower(model: ir.Model, device: Target, storage: Storage, options: PassOptions) -> tuple[Any, list[WeightSpec]]:
    """The Relax module with the entry points, and the weights they take, in order."""
    choose_threads()  # before TVM makes its workers: the artifact may be run in this same process
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


def _weight_names(model: ir.Model) -> frozenset[str]:
    return frozenset(json.loads(model.metadata_props["v4c.weights"]))


class OnnxSource:
    """An ONNX file that `v4c.export` wrote, as a source of the graph and of the weights.

    Raises:
        CheckpointError: the file is missing or not ONNX.
        UnsupportedError: it was not exported by v4c.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise CheckpointError(f"{path}: expected an ONNX file, found none")
        try:
            self.model = ir.load(path)
        except Exception as error:  # protobuf raises its own kinds for any damage
            raise CheckpointError(f"{path}: expected an ONNX file, found {type(error).__name__}: {error}") from error
        if "v4c.config" not in self.model.metadata_props:
            raise UnsupportedError(f"{path}: expected a model exported by v4c (metadata v4c.config), found none")
        self.config = ModelConfig.from_dict(json.loads(self.model.metadata_props["v4c.config"]), str(path))

    @property
    def has_weights(self) -> bool:
        """False for a graph exported without weights."""
        return not {v.name for v in self.model.graph.inputs}.intersection(self.names())

    def names(self) -> list[str]:
        """Names of the weights."""
        return list(json.loads(self.model.metadata_props["v4c.weights"]))

    def load(self, name: str, dtype: str | None = None) -> np.ndarray:
        """One weight; float32 when `dtype` is ``f32``, else as stored."""
        value = self.model.graph.initializers.get(name)
        if value is None or value.const_value is None:
            raise CheckpointError(f"{self.path}: weight {name}: expected an initializer, found none")
        try:
            array = value.const_value.numpy()
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path}: weight {name}: its data cannot be read: {error}") from error
        return array.astype(np.float32) if dtype == "f32" and array.dtype != np.float32 else array


def _tell(report: PassReport, progress: Progress | None) -> None:
    """Report a pass as progress: places rewritten, and each place left alone with the reason."""
    if progress:
        progress(f"{report.name}: {report.rewritten} places", 0, 0)
        for refusal in report.refusals:
            progress(f"{report.name}: left alone {refusal}", 0, 0)


def _graph(
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


def _write_weights(
    writer: ArtifactWriter,
    source: WeightSource | OnnxSource,
    device: Target,
    specs: list[WeightSpec],
    packed: list[artifact.WeightSpec],
    progress: Progress | None,
) -> None:
    done, total = 0, sum(w.nbytes for w in packed)
    for spec, stored in zip(specs, packed, strict=True):
        if progress:
            progress("pack weights", done, total)
        writer.write_weight(spec.name, device.pack(spec, _load(source, spec)))
        done += stored.nbytes
    if progress:
        progress("pack weights", total, total)


def _load(source: WeightSource | OnnxSource, spec: WeightSpec) -> np.ndarray:
    """A weight from its tensors, joined along axis 0 where it is merged."""
    arrays = []
    for name, shape in spec.tensors:
        array = source.load(name, None if spec.dtype == "int64" else "f32")
        if array.shape != shape:
            raise CheckpointError(f"{name}: expected shape {list(shape)}, found {list(array.shape)}")
        arrays.append(array)
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


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
        dtypes=artifact.DTypes(storage.products, "float32", "float32"),
        config=config.to_dict(),
        vocab_size=config.vocab_size,
        max_context=config.max_position_embeddings,
        eos_token_ids=config.eos_token_ids,
        caches=tuple(artifact.CacheSpec(c.path, c.dtype, _dims(c)) for c in model_caches(config)),
        entry_points=entry_points,
        build=notes,
    )


def _dims(spec: CacheSpec) -> tuple[artifact.Dim, ...]:
    rows: artifact.Dim = artifact.Rows(spec.ratio) if spec.ratio else spec.rows
    return ("batch", rows) if spec.width is None else ("batch", rows, spec.width)
