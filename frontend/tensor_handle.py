"""One tensor of a checkpoint, read in slices: dequantised rows, or the raw codes and scales of its matrices.

A stack of experts may lie in one tensor or in a thousand; a matrix may be plain, FP8 or FP4 (`block_formats`). Opening
a handle compares shapes and dtypes; data is mapped slice by slice, so memory follows what is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from v4c.errors import CheckpointError, UnsupportedError

from .block_formats import E8M0, E8M0_NAN, FORMATS, FP4, BlockFormat, decode
from .names import TensorInfo
from .safetensors_reader import StoredTensor

StoredFormat = Literal["f32", "bf16", "f16", "fp8", "fp4", "int64"]
"""What a tensor is stored as; ``"fp8"`` and ``"fp4"`` come with scales."""

FLOATS: dict[str, StoredFormat] = {"F32": "f32", "BF16": "bf16", "F16": "f16"}
INTEGERS: dict[str, StoredFormat] = {"I64": "int64", "I32": "int64"}
# Published FP4 is called I8, each byte two columns; F4 counts the columns themselves.
_BLOCKS: dict[str, StoredFormat] = {"F8_E4M3": "fp8", "I8": "fp4", "U8": "fp4", "F4": "fp4"}
_SCALES = ("F8_E8M0", "U8", "F32")
_OTHER_QUANTISED = ("F8_E5M2", "F8_E8M0", "F6_E2M3", "F6_E3M2")

_SAFE_SCALE = float(E8M0[252])
"""Times the largest FP4 value this is finite."""


def stored_format(
    name: str, info: TensorInfo, shape: tuple[int, ...], stored: StoredTensor, scale: StoredTensor | None
) -> StoredFormat:
    """What `stored` is, checked to hold a tensor of `shape`.

    Args:
        name: what to call it in messages.
        info: of the tensor it is, or is a piece of; only ``"weight"`` tensors may be quantised.
        shape: of the values, ``[..., R, C]`` where it has scales.
        stored: the tensor in the file.
        scale: its scales, if the file holds any.

    Raises:
        CheckpointError: a wrong shape or dtype, of data or scales; scales that are missing or stand beside plain data.
        UnsupportedError: a quantised format that v4c does not read.
    """
    where = f"{stored.file}: {name}"
    block = _BLOCKS.get(stored.dtype) if info.kind == "weight" else None
    if block is None:
        allowed = INTEGERS if info.kind == "int64" else FLOATS
        _expect_shape(where, stored, shape)
        if info.kind == "weight" and stored.dtype in _OTHER_QUANTISED:
            raise UnsupportedError(f"{where}: expected F8_E4M3 or I8 (FP4) weights, found {stored.dtype}")
        if stored.dtype not in allowed:
            raise CheckpointError(
                f"{where}: expected one of {', '.join(allowed)}, found {stored.dtype} ({stored.name})"
            )
        if scale is not None:
            raise CheckpointError(
                f"{scale.file}: {scale.name}: expected F8_E4M3 or I8 (FP4) weights beside scales, found {stored.dtype}"
            )
        return allowed[stored.dtype]
    if scale is None:
        raise CheckpointError(f"{where}: expected block scales for {stored.dtype} ({stored.name}), found none")
    form, (*lead, rows, columns) = FORMATS[block], shape
    held = form.code_shape(rows, columns) if stored.dtype != "F4" else (rows, columns)
    _expect_shape(where, stored, (*lead, *held))
    _expect_shape(f"{scale.file}: scales of {name}", scale, (*lead, *form.scale_shape(rows, columns)))
    if scale.dtype not in _SCALES:
        raise CheckpointError(f"{scale.file}: {scale.name}: expected one of {', '.join(_SCALES)}, found {scale.dtype}")
    return block


def _expect_shape(where: str, stored: StoredTensor, shape: tuple[int, ...]) -> None:
    if stored.shape != shape:
        raise CheckpointError(f"{where}: expected shape {list(shape)}, found {list(stored.shape)} ({stored.name})")


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix ``[rows, columns]`` as a file holds it.

    Attributes:
        name: canonical name of the tensor that it is or belongs to.
        form: its block format; None where it is plain.
        stored: the data in its file.
        scale: its scales' place in the file; None where it is plain.
    """

    name: str
    rows: int
    columns: int
    form: BlockFormat | None
    stored: StoredTensor
    scale: StoredTensor | None

    def codes(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Raw codes of some rows: uint8 ``[n, columns]`` for FP8, ``[n, ceil(columns / 2)]`` for FP4, low nibble first.

        Raises:
            UnsupportedError: the matrix is plain.
            CheckpointError: the file shrank or vanished.
        """
        if self.form is None:
            raise UnsupportedError(f"{self.stored.file}: {self.name}: expected FP8 or FP4, found {self.stored.dtype}")
        return self.stored.raw(start, stop)

    def scales(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """E8M0 codes of the blocks that some rows touch: uint8 ``[blocks, ceil(columns / block_columns)]``.

        Raises:
            UnsupportedError: the matrix is plain, or its scales are float32.
            CheckpointError: the file shrank or vanished, or a scale is NaN.
        """
        if self.form is None or self.scale is None or self.scale.dtype == "F32":
            found = self.stored.dtype if self.scale is None else f"{self.scale.dtype} scales"
            raise UnsupportedError(f"{self.stored.file}: {self.name}: expected E8M0 scales, found {found}")
        first, last = self._blocks(start, stop)
        codes = self.scale.raw(first, last)
        if codes.size and codes.max() == E8M0_NAN:
            row, column = np.argwhere(codes == E8M0_NAN)[0]
            raise CheckpointError(
                f"{self.scale.file}: {self.scale.name}: expected scales that are numbers, found the E8M0 code of NaN "
                f"(0xff) at [{first + row}, {column}]"
            )
        return codes

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Values of some rows ``[n, columns]``: float32 where the matrix has scales, else as stored (a memory map).

        Raises:
            CheckpointError: the file shrank or vanished; a code or scale that is NaN; a value beyond float32.
        """
        if self.form is None or self.scale is None:
            return self.stored.map(start, stop)
        start, stop, _ = slice(start, stop).indices(self.rows)
        if self.scale.dtype == "F32":
            scales = self.scale.map(*self._blocks(start, stop))
            certain = False
        else:
            scales = E8M0[self.scales(start, stop)]
            certain = self.form is FP4 and (scales.size == 0 or scales.max() <= _SAFE_SCALE)
        values = decode(self.form, self.codes(start, stop), scales, self.columns, start)
        if not certain and not np.isfinite(values).all():
            row, column = np.argwhere(~np.isfinite(values))[0]
            raise CheckpointError(
                f"{self.stored.file}: {self.stored.name}: expected finite numbers, "
                f"found {values[row, column]} at [{start + row}, {column}]"
            )
        return values

    def _blocks(self, start: int, stop: int | None) -> tuple[int, int]:
        """The range of rows of scales for these rows of the matrix."""
        assert self.form is not None
        start, stop, _ = slice(start, stop).indices(self.rows)
        first = start // self.form.block_rows
        return first, -(-stop // self.form.block_rows) if stop > start else first


class TensorHandle:
    """A tensor of floats, read by slices of its first axis. `checkpoint.Checkpoint.tensor` makes them.

    Attributes:
        name: its canonical name.
        shape: of the values: ``[N]``, ``[R, C]``, or ``[E, R, C]`` for a stack of experts.
        format: what it is stored as.
        parts: matrices that an element of the stack lies in, one below the other: 2 where gate and up projection are
            stored apart.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        format: StoredFormat,
        nbytes: int,
        whole: StoredTensor | None,
        matrix: Callable[[int], StoredMatrix],
        parts: int = 1,
    ) -> None:
        """For `Checkpoint`.

        Args:
            nbytes: see the property.
            whole: the data, where one plain tensor holds it all.
            matrix: the matrix at a place: of a stack, place ``element * parts + part``.
        """
        self.name, self.shape, self.format, self.nbytes, self.parts = name, shape, format, nbytes, parts
        self._whole, self._matrix = whole, matrix

    def matrices(self, element: int = 0) -> tuple[StoredMatrix, ...]:
        """The matrices of one element of a stack (gate and up apart where the file has them apart), or of a matrix."""
        return tuple(self._matrix(element * self.parts + part) for part in range(self.parts))

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Elements ``[start, stop)`` of the first axis: float32 where quantised, else as stored.

        A read-only memory map where the file already holds exactly that. Raises as `StoredMatrix.read`.
        """
        if self._whole is not None:
            return self._whole.map(start, stop)
        if len(self.shape) < 3:
            return self._matrix(0).read(start, stop)
        start, stop, _ = slice(start, stop).indices(self.shape[0])
        dtype = np.dtype(np.float32) if self.format in FORMATS else self._matrix(0).read(0, 0).dtype
        values = np.empty((stop - start, self.parts, self.shape[1] // self.parts, self.shape[2]), dtype)
        for place in range(stop - start):
            for part, matrix in enumerate(self.matrices(start + place)):
                values[place, part] = matrix.read()
        return values.reshape(stop - start, *self.shape[1:])
