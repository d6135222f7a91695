"""Saving given tensors as a checkpoint folder, in Hugging Face's layout or upstream's, MTP layers included."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np

from v4c.errors import CheckpointError, InputError

from .checkpoint_writer import SHARD_BYTES, Content, Entry, Progress, write_checkpoint
from .config import ModelConfig
from .initialise import StoredDtype
from .names import TensorInfo, mtp_specs, sources, tensor_specs
from .native_layout import QUANTIZATION, published_config

Layout = Literal["hf", "upstream"]
LAYOUTS: tuple[Layout, ...] = ("hf", "upstream")


@dataclass(frozen=True)
class _Entry(Entry):
    """A tensor to write: number `piece` of `pieces` that the tensor `source` is cut into."""

    source: str
    piece: int
    pieces: int


def save_checkpoint(
    config: ModelConfig,
    tensors: Mapping[str, np.ndarray],
    folder: str | Path,
    layout: Layout = "hf",
    dtype: StoredDtype = "f32",
    files: Mapping[str, bytes] | None = None,
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model's tensors as a checkpoint folder.

    Args:
        config: the model; ``config.json`` gets its `dtype` from the argument `dtype`.
        tensors: every tensor of `names.tensor_specs` and `names.mtp_specs` by name, float32 or int64.
        folder: must not exist, or be empty. Its parent must exist.
        layout: ``"hf"``: Hugging Face's names and ``config.json``, stacked experts. ``"upstream"``: the published names
            and ``config.json``, a tensor per expert and projection.
        dtype: of the weight matrices; hyper-connections, norms, sinks and biases are float32 always.
        files: further files of the folder, such as ``tokenizer.json``: plain names and their content.
        progress: called with bytes written and bytes in all.
        shard_bytes: largest data of one file. A single tensor above it has a file of its own.

    Raises:
        CheckpointError: a tensor is missing, or has the wrong shape or dtype.
        InputError: an unknown `layout`.
        OutputError: the folder is not empty, or cannot be written; nothing is left behind.
        UnsupportedError: a schedule that the published ``config.json`` has no words for.
    """
    if layout not in LAYOUTS:
        raise InputError(f"layout: expected one of {', '.join(LAYOUTS)}, found {layout!r}")
    specs = tensor_specs(config) | mtp_specs(config)
    for name, info in specs.items():
        _check(name, info, tensors.get(name))
    stored = replace(config, dtype="float32" if dtype == "f32" else "bfloat16")
    values = stored.to_dict()
    if layout == "upstream":
        values = {key: value for key, value in published_config(stored).items() if key not in QUANTIZATION}
    entries = [entry for name, info in specs.items() for entry in _entries(config, name, info, layout, dtype)]

    def data(entry: _Entry) -> Iterator[bytes]:
        info, array = specs[entry.source], tensors[entry.source]
        if entry.pieces > 1:
            array = array.reshape(entry.pieces, -1)[entry.piece]
        if info.kind == "weight" and dtype == "bf16":
            array = array.astype(ml_dtypes.bfloat16)
        yield np.ascontiguousarray(array).tobytes()

    write_checkpoint(Content(entries, data, values, files or {}), folder, progress, shard_bytes)


def _check(name: str, info: TensorInfo, array: np.ndarray | None) -> None:
    wanted = "int64" if info.kind == "int64" else "float32"
    if array is None or array.shape != info.shape or array.dtype != wanted:
        found = "none" if array is None else f"{array.dtype} of shape {list(array.shape)}"
        raise CheckpointError(f"{name}: expected {wanted} of shape {list(info.shape)}, found {found}")


def _entries(config: ModelConfig, name: str, info: TensorInfo, layout: Layout, dtype: StoredDtype) -> Iterator[_Entry]:
    """What `name` is written as; a stack is cut in the order in which `names.sources` names its pieces."""
    pieces: tuple[str, ...] = (name,) if layout == "hf" else sources(config, name).pieces
    shape = info.shape
    if len(pieces) > 1:
        shape = (shape[0] * shape[1] // len(pieces), shape[2])
    code, width = {"int64": ("I64", 8), "fp32": ("F32", 4), "weight": ("F32", 4) if dtype == "f32" else ("BF16", 2)}[
        info.kind
    ]
    for number, piece in enumerate(pieces):
        yield _Entry(piece, shape, code, width * prod(shape), name, number, len(pieces))
