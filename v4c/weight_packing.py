"""Packs weights slice by slice: memory follows the slice, not the tensor, and a killed compilation can go on.

A slice is a run of rows that the target can pack by itself; the slices of a weight, one behind the other, are what
packing it whole would give.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from v4c.errors import CheckpointError
from v4c.packing_memory import SLICE_BYTES, peak_bytes_for
from v4c.passes.relax.layouts import WeightSpec
from v4c.progress import Progress
from v4c.runtime import manifest as artifact
from v4c.runtime.writer import ArtifactWriter
from v4c.stored_formats import read_native
from v4c.targets.base import Target
from v4c.targets.native_rows import NATIVE_GROUPS


@runtime_checkable
class SlicePacking(Protocol):
    """A target that can pack runs of rows by themselves."""

    def pack_unit(self, weight: WeightSpec) -> int | None:
        """Rows of each of the weight's tensors at whose multiples it may be cut; None where it may not."""


@runtime_checkable
class Rows(Protocol):
    """A tensor of floats that is read in slices along its first axis."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Elements ``[start, stop)`` of the first axis."""


@dataclass(frozen=True)
class _Whole:
    """`Rows` of an array in memory."""

    array: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self.array[start:stop] if self.array.ndim else self.array


@dataclass(frozen=True)
class Slice:
    """A run of rows of one weight.

    Attributes:
        weight: what is packed: the weight's spec with the shape of the run.
        tensors: names of the tensors it is read from, joined along the first axis.
        start: first row of the run, in its tensor.
        stop: the row behind its last.
    """

    weight: WeightSpec
    tensors: tuple[str, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes as float32 (int64 for ids)."""
        return prod(self.weight.shape) * (8 if self.weight.dtype == "int64" else 4)


def slices(device: Target, weight: WeightSpec) -> Iterator[Slice]:
    """The slices of a weight, in the order they are stored."""
    unit = device.pack_unit(weight) if isinstance(device, SlicePacking) else None
    if unit is None or weight.dtype == "int64" or not weight.shape:
        rows = weight.shape[0] if weight.shape else 1
        yield Slice(weight, tuple(name for name, _ in weight.tensors), 0, rows)
        return
    row = 4 * prod(weight.shape[1:])
    step = max(1, SLICE_BYTES // max(1, row * unit)) * unit
    for name, shape in weight.tensors:
        for start in range(0, shape[0], step):
            stop = min(start + step, shape[0])
            groups = max(1, weight.groups * (stop - start) // weight.shape[0])
            part = replace(weight, shape=(stop - start, *shape[1:]), parts=(), groups=groups)
            yield Slice(part, (name,), start, stop)


def peak_bytes(device: Target, weights: Sequence[WeightSpec]) -> int:
    """About how much memory packing takes at once, this process and its libraries included."""
    return peak_bytes_for(max((s.nbytes for weight in weights for s in slices(device, weight)), default=0))


def pack_weights(
    writer: ArtifactWriter,
    source: Any,
    device: Target,
    weights: Sequence[WeightSpec],
    packed: Sequence[artifact.WeightSpec],
    progress: Progress | None = None,
) -> None:
    """Read, pack and write all weights but those the writer has from an earlier attempt.

    Args:
        writer: `packed` has been declared to it.
        source: an object with ``load(name, dtype)``, and perhaps ``tensor(name)`` that gives `Rows`.
        device: packs.
        weights: as the compiled functions take them, in order.
        packed: the same as the artifact stores them.
        progress: called with bytes written and bytes in all.

    Raises:
        CheckpointError: a tensor that is missing, damaged, or not of the shape its weight says.
        OutputError: the artifact cannot be written.
    """
    done, total = 0, sum(weight.nbytes for weight in packed)
    reader = _Reader(source)
    for weight, stored in zip(weights, packed, strict=True):
        there = writer.rows_written(weight.name)
        if there is None:
            done += stored.nbytes
            continue
        rows_in_all = stored.shape[0] if stored.shape else 1
        row_bytes = stored.nbytes // max(1, rows_in_all)
        done += there * row_bytes
        row = 0
        for part in slices(device, weight):
            rows = device.kernels.packed(part.weight).shape[0] if stored.shape else 1
            row += rows
            if rows and row <= there:
                continue
            if progress:
                progress("pack weights", done, total)
            taken: Any
            if weight.dtype in NATIVE_GROUPS:
                taken = read_native(source, weight, part.tensors, part.start, part.stop)
            else:
                taken = reader.read(weight, part)
            writer.write_rows(weight.name, device.pack(part.weight, taken))
            done += rows * row_bytes
    if progress:
        progress("pack weights", total, total)


class _Reader:
    """Reads slices of a source's tensors; the one read last stays open."""

    def __init__(self, source: Any) -> None:
        self._source = source
        self._name = ""
        self._rows: Rows = _Whole(np.zeros(0, np.float32))

    def read(self, weight: WeightSpec, part: Slice) -> np.ndarray:
        """The rows of a slice: float32, or int64 ids."""
        shapes, arrays = dict(weight.tensors), []
        for name in part.tensors:
            rows = self._open(name, weight.dtype)
            if tuple(rows.shape) != tuple(shapes[name]):
                raise CheckpointError(f"{name}: expected shape {list(shapes[name])}, found {list(rows.shape)}")
            array = rows.read(part.start, part.stop) if len(part.tensors) == 1 else rows.read()
            arrays.append(array if weight.dtype == "int64" else np.asarray(array, np.float32))
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

    def _open(self, name: str, dtype: str) -> Rows:
        if name != self._name:
            self._rows = _Whole(np.zeros(0, np.float32))  # let go of the last one first
            if dtype == "int64":  # ids are range-checked as a whole
                self._rows = _Whole(self._source.load(name, None))
            elif hasattr(self._source, "tensor"):
                self._rows = self._source.tensor(name)
            else:
                self._rows = _Whole(self._source.load(name, "f32"))
            self._name = name
        return self._rows


def resume_key(
    source: Any, device: Target, weights: Sequence[WeightSpec], packed: Sequence[artifact.WeightSpec]
) -> str | None:
    """Equal for compilations that store the same bytes: same tensors, packing and versions; None where nobody can say.

    Files count as the same by path, size and time of change.
    """
    if not hasattr(source, "identity"):
        return None
    code = hashlib.sha256()
    for kind in (type(device), type(source)):
        if kind.__module__.startswith("v4c."):
            for file in sorted(Path(inspect.getfile(kind)).parent.rglob("*.py")):
                code.update(file.read_bytes())
    described = {
        "source": source.identity(),
        "target": device.name,
        "weights": [asdict(weight) for weight in weights],
        "packed": [asdict(weight) for weight in packed],
        "slice_bytes": SLICE_BYTES,
        "code": code.hexdigest(),
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()
