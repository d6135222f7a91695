"""A random checkpoint in the published formats: FP8 and FP4 with their scales, in upstream's names or Hugging Face's.

The values are those of `initialise` for the same seed, rounded; so whatever reads real checkpoints can be tested
without them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np

from .block_formats import FORMATS, encode
from .checkpoint_writer import SHARD_BYTES, Content, Entry, Progress, write_checkpoint
from .config import ModelConfig
from .initialise import random_blocks
from .names import TensorInfo, mtp_specs, sources, tensor_specs
from .native_layout import QUANTIZATION, NativeFormat, native_format, published_config

Naming = Literal["upstream", "hf"]

_CHUNK_ELEMENTS = 1 << 22
_STORED = {"bf16": ("BF16", 2), "f32": ("F32", 4), "int64": ("I64", 8), "fp8": ("F8_E4M3", 1), "fp4": ("I8", 1)}
_NUMPY = {"bf16": ml_dtypes.bfloat16, "f32": np.float32, "int64": np.int64}


@dataclass(frozen=True)
class _Entry(Entry):
    """A tensor to write: values of `source` (several entries in a row may share one), or the scales of the entry
    before it.

    Attributes:
        values: shape of the values; of codes, what they stand for.
    """

    source: str
    values: tuple[int, ...]
    format: NativeFormat | Literal["scales"]


def initialise_native(
    config: ModelConfig,
    folder: str | Path,
    seed: int = 0,
    naming: Naming = "upstream",
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a random checkpoint as `native_layout` describes it.

    Data is streamed; memory stays at some hundred megabytes.

    Args:
        config: what to write; ``config.json`` gets `dtype` bfloat16.
        folder: must not exist, or be empty. Its parent must exist.
        seed: of the values.
        naming: ``"upstream"``: published names and ``config.json``, a tensor per expert and projection, MTP layers.
            ``"hf"``: Hugging Face's names and ``config.json``, stacked experts, no MTP layers (transformers has none).
        progress: called with bytes written and bytes in all.
        shard_bytes: largest data of one file. A single tensor above it has a file of its own.

    Raises:
        OutputError: the folder is not empty, or cannot be written; nothing is left behind.
        UnsupportedError: a schedule that the published ``config.json`` has no words for.
    """
    stored = replace(config, dtype="bfloat16")
    specs = tensor_specs(config)
    if naming == "upstream":
        specs |= mtp_specs(config)
        values = published_config(stored)
    else:
        values = stored.to_dict() | QUANTIZATION
    entries = (entry for name, info in specs.items() for entry in _entries(config, name, info, naming))
    stream = _NativeStream(config, specs, seed)
    write_checkpoint(Content(entries, stream.take, values), folder, progress, shard_bytes)


def _entries(config: ModelConfig, name: str, info: TensorInfo, naming: Naming) -> Iterator[_Entry]:
    """The tensors that `name` is written as."""
    form = native_format(name, info)
    source = sources(config, name)
    pieces: tuple[str, ...] = (name,) if naming == "hf" else source.pieces
    shape = info.shape
    if len(pieces) > 1:
        shape = (shape[0] * shape[1] // len(pieces), shape[2])
    code, width = _STORED[form]
    for piece in pieces:
        if form not in FORMATS:
            yield _Entry(piece, shape, code, width * prod(shape), name, shape, form)
            continue
        *stack, rows, columns = shape
        held = (*stack, *FORMATS[form].code_shape(rows, columns))
        scales = (*stack, *FORMATS[form].scale_shape(rows, columns))
        yield _Entry(piece, held, code, prod(held), name, shape, form)
        scale = f"{piece}_scale_inv" if naming == "hf" else piece.removesuffix("weight") + "scale"
        yield _Entry(scale, scales, "F8_E8M0", prod(scales), name, (), "scales")


class _NativeStream:
    """Values of consecutive entries as bytes; the scales of codes are kept until their own entry comes."""

    def __init__(self, config: ModelConfig, specs: dict[str, TensorInfo], seed: int) -> None:
        self._config, self._specs, self._seed = config, specs, seed
        self._source = ""
        self._blocks: Iterator[np.ndarray] = iter(())
        self._rest = np.zeros(0, np.float32)
        self._scales: list[np.ndarray] = []

    def take(self, entry: _Entry) -> Iterator[bytes]:
        """The bytes of `entry`, in pieces of some megabytes."""
        if entry.format == "scales":
            yield from (scales.tobytes() for scales in self._scales)
            self._scales = []
            return
        if entry.source != self._source:
            self._source, info = entry.source, self._specs[entry.source]
            self._blocks = random_blocks(self._config, entry.source, info, self._seed)
            self._rest = np.zeros(0, np.int64 if info.kind == "int64" else np.float32)
        form = FORMATS.get(entry.format)
        columns = entry.values[-1] if form is not None else 1
        rows = prod(entry.values) // columns
        step = max(1, _CHUNK_ELEMENTS // columns)
        if form is not None:
            step = -(-step // form.block_rows) * form.block_rows
        for start in range(0, rows, step):
            values = self._values(min(step, rows - start) * columns)
            if form is None:
                yield values.astype(_NUMPY[entry.format], copy=False).tobytes()
                continue
            codes, scales = encode(form, values.reshape(-1, columns))
            self._scales.append(scales)
            yield codes.tobytes()

    def _values(self, count: int) -> np.ndarray:
        """The next `count` values of the source."""
        taken, missing = [self._rest[:count]], count - len(self._rest[:count])
        self._rest = self._rest[count:]
        while missing:
            block = next(self._blocks)
            taken.append(block[:missing])
            self._rest = block[missing:]
            missing -= len(taken[-1])
        return np.concatenate(taken)
