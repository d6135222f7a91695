"""Read safetensors files, trusting nothing: lengths, offsets, shapes and dtypes are checked before data is mapped.

A header is a promise about the rest of the file. It is compared with the file's real size, so a truncated download is
found when a checkpoint is opened and not when a matrix is multiplied. Format:
https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from v4c.errors import CheckpointError, UnsupportedError

from .strict_json import parse_object, show

# Bits, for the FP4 and FP6 formats pack several values into a byte.
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64,
    "F64": 64, "C64": 64,
}  # fmt: skip
"""Every dtype name of the format, and its bits per element."""

_ARRAY_DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
}

_LENGTH_BYTES = 8
_LARGEST_HEADER = 100_000_000  # the format's own limit
_LARGEST_DIM = 2**48


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file: `dtype` as the format names it, and its byte range ``[start, stop)`` in the whole file."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.stop - self.start

    def map(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The data, or that of ``[start, stop)`` along the first axis, as a read-only memory map in its stored dtype
        (a copy where the file leaves it unaligned). What is not asked for is not mapped.

        Raises:
            CheckpointError: the file shrank or vanished since its header was read.
            UnsupportedError: a dtype that v4c does not compute with.
        """
        dtype = _ARRAY_DTYPES.get(self.dtype)
        if dtype is None:
            raise UnsupportedError(
                f"{self.file}: {self.name}: expected one of {', '.join(_ARRAY_DTYPES)}, found {self.dtype}"
            )
        shape = self.shape
        if not shape:
            return np.require(self._bytes(0, self.nbytes).view(dtype).reshape(()), requirements="A")
        start, stop, _ = slice(start, stop).indices(shape[0])
        row = dtype.itemsize * math.prod(shape[1:])
        array = self._bytes(start * row, stop * row).view(dtype).reshape(stop - start, *shape[1:])
        return np.require(array, requirements="A")

    def raw(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The bytes of ``[start, stop)`` along the first axis, uint8 ``[stop - start, bytes]``; raises as `map`.

        For formats that NumPy has no type for.
        """
        start, stop, _ = slice(start, stop).indices(self.shape[0])
        row = self.nbytes // self.shape[0] if self.shape[0] else 0
        return self._bytes(start * row, stop * row).reshape(stop - start, row)

    def element(self, index: int) -> StoredTensor:
        """The tensor at `index` of the first axis."""
        each = self.nbytes // self.shape[0]
        start = self.start + index * each
        return replace(self, name=f"{self.name}[{index}]", shape=self.shape[1:], start=start, stop=start + each)

    def _bytes(self, start: int, stop: int) -> np.ndarray:
        """uint8; `start` and `stop` count from the tensor's first byte."""
        if start == stop:
            return np.zeros(0, np.uint8)
        try:
            data = np.memmap(self.file, np.uint8, mode="r", offset=self.start + start, shape=(stop - start,))
        except (OSError, ValueError) as failure:
            raise CheckpointError(
                f"{self.file}: {self.name}: expected {stop - start} bytes at {self.start + start}, found: {failure}"
            ) from None
        return np.asarray(data)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file by name, in the order of the header.

    Raises:
        CheckpointError: the file cannot be read or breaks the format; the message names the file and the tensor.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            prefix = file.read(_LENGTH_BYTES)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < _LENGTH_BYTES:
                raise CheckpointError(f"{path}: expected a safetensors file, found only {size} bytes")
            if length > min(_LARGEST_HEADER, size - _LENGTH_BYTES):
                raise CheckpointError(
                    f"{path}: expected a header of at most {min(_LARGEST_HEADER, size - _LENGTH_BYTES)} bytes, "
                    f"found a length of {length}: truncated, or not safetensors"
                )
            header = parse_object(file.read(length), f"{path}: header", CheckpointError)
    except OSError as failure:
        raise CheckpointError(f"{path}: expected a readable file, found: {failure.strerror or failure}") from None
    header.pop("__metadata__", None)
    data = _LENGTH_BYTES + length
    tensors = {name: _stored_tensor(path, name, entry, data, size) for name, entry in header.items()}
    _check_layout(path, list(tensors.values()), data, size)
    return tensors


def _is_length(value: Any) -> bool:
    return type(value) is int and 0 <= value < _LARGEST_DIM


def _stored_tensor(path: Path, name: str, entry: Any, data: int, size: int) -> StoredTensor:
    where = f"{path}: {show(name)[1:-1]}"
    if type(entry) is not dict or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: expected dtype, shape and data_offsets, found {show(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(dtype) is not str or dtype not in DTYPE_BITS:
        raise CheckpointError(f"{where}: expected a known dtype, found {show(dtype)}")
    if type(shape) is not list or not all(_is_length(dim) for dim in shape):
        raise CheckpointError(f"{where}: expected a shape of non-negative integers, found {show(shape)}")
    if type(offsets) is not list or len(offsets) != 2 or not all(_is_length(offset) for offset in offsets):
        raise CheckpointError(f"{where}: expected two data_offsets, found {show(offsets)}")
    begin, end = offsets
    if not begin <= end <= size - data:
        raise CheckpointError(
            f"{where}: expected data_offsets within {size - data} bytes of data, found {offsets}: "
            "out of bounds or truncated"
        )
    bits = DTYPE_BITS[dtype]
    for dim in shape:
        bits *= dim
    if bits != 8 * (end - begin):
        raise CheckpointError(f"{where}: expected {bits / 8:g} bytes for {dtype} {shape}, found {end - begin}")
    return StoredTensor(path, name, dtype, tuple(shape), data + begin, data + end)


def _check_layout(path: Path, tensors: list[StoredTensor], data: int, size: int) -> None:
    """The format allows neither overlaps nor holes, so the sorted ranges follow each other to the end of the file."""
    position, previous = data, "the header"
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.stop)):
        if tensor.start != position:
            found = "an overlap" if tensor.start < position else "a hole"
            raise CheckpointError(f"{path}: {tensor.name}: expected its data right behind {previous}, found {found}")
        position, previous = tensor.stop, tensor.name
    if position != size:
        raise CheckpointError(f"{path}: expected its data to end at byte {position}, found {size} bytes in the file")
