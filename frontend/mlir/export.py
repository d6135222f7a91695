"""Writes a model as ``FILE.mlir``, with ``FILE.mlir.safetensors`` beside it unless weights are left out."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from v4c.errors import OutputError, UnsupportedError
from v4c.frontend.checkpoint_writer import Entry, write_header
from v4c.frontend.config import ModelConfig
from v4c.frontend.model.model import WeightSource
from v4c.progress import Progress

if TYPE_CHECKING:
    from .module import Module

# By MLIR element type: safetensors' name and NumPy's type.
_STORED = {
    "f32": ("F32", np.dtype("<f4")),
    "bf16": ("BF16", np.dtype(ml_dtypes.bfloat16)),
    "f16": ("F16", np.dtype("<f2")),
    "i64": ("I64", np.dtype("<i8")),
}


def require_torch_mlir() -> None:
    """Raise UnsupportedError, with what to install, where torch-mlir is missing."""
    if importlib.util.find_spec("torch_mlir") is None:
        raise UnsupportedError("format 'mlir': expected the package torch-mlir, found none: pip install 'v4c[mlir]'")


def export(
    config: ModelConfig,
    path: Path,
    source: WeightSource | None,
    *,
    all_logits: bool = False,
    dtype: str = "f32",
    progress: Progress | None = None,
) -> None:
    """Lower `config` (see `v4c.frontend.mlir.module.build`) and write it, see `save`."""
    from .module import build  # needs torch-mlir

    save(build(config, all_logits=all_logits, dtype=dtype, progress=progress), path, source, progress)


def save(module: Module, path: Path, source: WeightSource | None, progress: Progress | None = None) -> None:
    """Write the module and, from `source`, its weights; both appear only when complete.

    Args:
        module: what to write.
        path: the file; its folder exists.
        source: of the weights, read one at a time; None leaves them out.
        progress: told of each weight.

    Raises:
        OutputError: the folder cannot be written, or the disk is full.
    """
    data_name = path.name + ".safetensors"
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            if source is not None:
                _write_weights(module.weights, Path(folder) / data_name, source, progress)
            text = module.text(None if source is None else data_name)
            (Path(folder) / path.name).write_text(text, encoding="utf-8")
            for name in (*([] if source is None else [data_name]), path.name):
                written = Path(folder) / name
                with written.open("rb") as file:
                    os.fsync(file.fileno())
                written.replace(path.parent / name)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error


def _write_weights(weights: dict[str, str], path: Path, source: WeightSource, progress: Progress | None) -> None:
    entries, kinds = [], {}
    for name, kind in weights.items():
        *sizes, element = kind.removeprefix("tensor<").removesuffix(">").split("x")
        code, kinds[name] = _STORED[element]
        shape = tuple(map(int, sizes))
        entries.append(Entry(name, shape, code, int(np.prod(shape)) * kinds[name].itemsize))
    with path.open("wb") as file:
        write_header(file, entries)
        for done, entry in enumerate(entries):
            if progress:
                progress(f"write {entry.name}", done, len(entries))
            array = source.load(entry.name, None if entry.dtype == "I64" else "f32")
            if array.shape != entry.shape:
                raise OutputError(f"{entry.name}: expected shape {list(entry.shape)}, found {list(array.shape)}")
            stored = np.ascontiguousarray(array.astype(kinds[entry.name], copy=False))
            file.write(stored.reshape(-1).view(np.uint8).data)
