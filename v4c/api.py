"""The Python face of v4c: export, compile and load. Heavy libraries are imported by the calls that need them."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from v4c.errors import CheckpointError, UnsupportedError
from v4c.progress import Progress

if TYPE_CHECKING:
    from v4c.runtime.model import Model

Source = Any
"""A checkpoint folder, an ONNX file (compile only), a `ModelConfig` (random weights), or an object with ``config`` and
``load(name, dtype)``."""


def export(
    source: Source,
    path: str | os.PathLike[str],
    *,
    format: str = "onnx",
    dtype: str = "f32",
    weights: bool = True,
    all_logits: bool = False,
    mtp: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Path | dict[str, Any]:
    """Export a checkpoint as ONNX with v4c's custom ops and bodies of standard ones for them, or as MLIR.

    Args:
        source: folder of a Hugging Face checkpoint, or a `ModelConfig` for random weights (seed 0).
        path: the file to write; weights go to ``<path>.data`` beside it (MLIR: ``<path>.safetensors``).
        format: ``onnx``, or ``mlir``: linalg, through torch-mlir (the extra ``mlir``).
        dtype: storage of the weight matrices: ``f32``, ``bf16`` or ``f16``; arithmetic is float32.
        weights: False leaves the weights out: they become graph inputs (MLIR: arguments of ``@main``).
        all_logits: logits of every token instead of each row's last live one.
        mtp: write the multi-token-prediction layer as well, to ``NAME.mtp.onnx`` beside ``NAME.onnx``; the model then
            has the output ``streams``, which the layer takes. ONNX only.
        dry_run: report what would be written instead of writing it.
        progress: called with (what, done, total).

    Returns:
        The path written, or the report of a dry run.

    Raises:
        v4c.Error: bad input or an output that cannot be written; nothing is left behind.
    """
    from v4c.frontend.onnx_export import WEIGHT_DTYPES, attach_weights, build, check_destination, save

    _one_of("format", format, ("onnx", "mlir"))
    _one_of("dtype", dtype, tuple(WEIGHT_DTYPES))
    target = Path(path)
    if dry_run:
        from v4c.export_plan import plan

        return plan(_config(open_source(source, weights)), format=format, dtype=dtype, weights=weights)
    check_destination(target)
    if mtp and format != "onnx":
        raise UnsupportedError(f"mtp: expected format onnx, found {format}")
    if format == "mlir":
        from v4c.frontend.mlir import export as mlir

        mlir.require_torch_mlir()
        opened = open_source(source, weights)
        mlir.export(
            _config(opened), target, opened if weights else None, all_logits=all_logits, dtype=dtype, progress=progress
        )
        return target
    opened = open_source(source, weights)
    if mtp and not (getattr(opened, "mtp_specs", None) or (opened is source and source.num_nextn_predict_layers)):
        raise CheckpointError(f"{source}: expected an MTP layer (tensors mtp.0.*) for mtp, found none that is whole")
    model = build(_config(opened), all_logits=all_logits, dtype=dtype, progress=progress)
    models = {target: model}
    if mtp:
        from v4c.frontend.mtp_graph import build_mtp, name_streams

        name_streams(model)
        models[target.with_name(f"{target.stem}.mtp{target.suffix}")] = build_mtp(_config(opened), dtype=dtype)
    for file, graph in models.items():
        if weights:
            attach_weights(graph, opened, progress)
        save(graph, file)
    return target


def compile(
    source: Source,
    path: str | os.PathLike[str],
    *,
    target: str = "cpu",
    dtype: str = "f32",
    quant: str = "none",
    kv: str = "f32",
    activations: str = "f32",
    weights: bool = True,
    disable_passes: Collection[str] = (),
    dump_ir: str | os.PathLike[str] | None = None,
    tuning: str | os.PathLike[str] | None = None,
    mtp: bool = True,
    strict: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Path | dict[str, Any]:
    """Compile a checkpoint or an exported ONNX file into an artifact folder.

    Args:
        source: folder of a checkpoint, ``.onnx`` file written by `export`, or a `ModelConfig` for random weights.
        path: folder to create; it may exist only if empty.
        target: ``cpu`` (this machine) or ``cpu:LEVEL`` with an x86-64 level; ``ascend`` or ``ascend:DEVICE``, such as
            ``ascend:Ascend950PR_9599``: programs for the device, and an x86 simulation of them that `load` runs.
        dtype: storage of the weight matrices: ``f32`` or ``bf16``; arithmetic is float32. Ascend stores ``f32`` as
            float16.
        quant: ``none``, ``int8`` or ``int4``: quantisation of the matrices of products, 32 weights to a float16 scale;
            the rows they are multiplied with are rounded to 8 bits likewise. The embedding stays as `dtype` has it;
            norms, routers, hyper-connections and sinks stay float32. ``native`` keeps FP8 and FP4 matrices of products
            as the checkpoint has them, and other weights bfloat16 or float32; the rows that FP4 is multiplied with are
            rounded to 8 bits.
        kv: storage of the window, the compressed rows and the indexer's: ``f32``, ``bf16``, or ``fp8`` (e4m3 with the
            rotated dims in bfloat16, and FP4 rows for the indexer). CPU only beyond ``f32``.
        activations: ``bf16`` rounds the rows that bfloat16 matrices are multiplied with to bfloat16: twice the
            products per instruction where the processor has AVX512-BF16; sums stay float32. CPU only, with `dtype`
            ``bf16``.
        weights: False builds the library alone; the artifact can be inspected, not run.
        disable_passes: names of optional passes to leave out.
        dump_ir: folder for the module's text after every pass.
        tuning: database that `tune` wrote; its schedules take the place of the defaults.
        mtp: compile the multi-token-prediction layer as well, where the checkpoint holds one and the target is a CPU:
            for speculative decoding.
        strict: a kernel that the device does not take is an error; otherwise the host runs it. Of Ascend only.
        dry_run: report what would be written instead of writing it.
        progress: called with (what, done, total).

    Returns:
        The path of the artifact, or the report of a dry run.

    Raises:
        v4c.Error: bad input or an output that cannot be written; nothing is left behind.
    """
    from v4c.compiler import DTYPES, KV_FORMATS, compile_model, plan, storage_of
    from v4c.targets.quantisation import QUANTISED
    from v4c.tuning import read_tuning

    _one_of("dtype", dtype, tuple(DTYPES))
    _one_of("quant", quant, ("none", *QUANTISED, "native"))
    _one_of("kv", kv, KV_FORMATS)
    _one_of("activations", activations, tuple(DTYPES))
    storage = storage_of(dtype, quant, next(known for known in KV_FORMATS if known == kv), activations)
    opened = open_source(source, weights)
    database = None if tuning is None else read_tuning(Path(tuning), target)
    if dry_run:
        return plan(opened, target=target, storage=storage, disable_passes=disable_passes, tuning=database, mtp=mtp)
    return compile_model(
        opened,
        Path(path),
        target=target,
        storage=storage,
        weights=weights,
        disable_passes=disable_passes,
        dump_ir=None if dump_ir is None else Path(dump_ir),
        tuning=database,
        mtp=mtp,
        strict=strict,
        progress=progress,
    )


def load(
    path: str | os.PathLike[str], *, threads: int | None = None, verify: str = "all",
    weights_memory: int | str | None = None, huge_pages: bool = False,
) -> Model:  # fmt: skip
    """Load an artifact for running; needs NumPy and TVM's runtime, neither torch nor a compiler.

    Args:
        path: folder of the artifact. Its library is code: load only artifacts you trust.
        threads: worker threads; default ``V4C_NUM_THREADS`` or the processors this process may use.
        verify: ``all`` checks every file's SHA-256, ``code`` the library and manifest only.
        weights_memory: bytes that weights may occupy, such as ``"4GiB"``: routed experts and rows of tables stay on
            disk but for those used last.
        huge_pages: copy the weights into memory of this process in pages of 2 MiB: a decode step takes some percent
            less, but the weights must fit and are not shared between processes. Not with ``weights_memory``.

    Raises:
        v4c.ArtifactError: the artifact is incomplete, altered, of another version or for another machine.
        v4c.UnsupportedError: ``huge_pages``, and the kernel has none to give.
        v4c.InputError: an argument is out of range, or less memory is free than ``huge_pages`` take.
    """
    from v4c.runtime.model import load as load_model

    return load_model(path, threads=threads, verify=verify, weights_memory=weights_memory, huge_pages=huge_pages)


def open_source(source: Source, weights: bool) -> Any:
    """The source as the driver takes it: an opened checkpoint, an ONNX source, or a config alone."""
    from v4c.extend import load_installed
    from v4c.frontend.checkpoint import Checkpoint
    from v4c.frontend.config import ModelConfig
    from v4c.frontend.initialise import RandomCheckpoint

    load_installed()
    if isinstance(source, ModelConfig):
        return RandomCheckpoint(source, seed=0) if weights else source
    if not isinstance(source, str | os.PathLike):
        return source
    path = Path(source)
    if path.suffix == ".onnx":
        from v4c.compiler import OnnxSource

        onnx_source = OnnxSource(path)
        if weights and not onnx_source.has_weights:
            raise CheckpointError(f"{path}: expected weights, found a graph without: pass weights=False (--no-weights)")
        return onnx_source
    checkpoint = Checkpoint.open(path)
    if weights:
        checkpoint.check()
    return checkpoint


def _config(opened: Any) -> Any:
    return getattr(opened, "config", opened)


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UnsupportedError(f"{name} {value!r}: expected one of {', '.join(known)}")
