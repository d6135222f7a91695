"""Memory of a simulated core: buffers in global memory, on-chip memories by address, and views of both."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np

from v4c.errors import Error

from .devices import Device
from .mlir_text import shaped

DTYPES: dict[str, np.dtype] = {
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
    "f8E4M3FN": np.dtype(ml_dtypes.float8_e4m3fn),
    "f8E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "i1": np.dtype(np.bool_),
    "i8": np.dtype(np.int8),
    "ui8": np.dtype(np.uint8),
    "i16": np.dtype(np.int16),
    "i32": np.dtype(np.int32),
    "i64": np.dtype(np.int64),
    "index": np.dtype(np.int64),
}
"""NumPy's dtype of each MLIR element type."""


class HIVMError(Error):
    """Scheduled HIVM that cannot be simulated, or that does what a device must not; the caller adds the kernel."""


def dtype_of(element: str) -> np.dtype:
    if element not in DTYPES:
        raise HIVMError(f"element type {element} is not simulated")
    return DTYPES[element]


@dataclass(frozen=True)
class Buffer:
    """A memref's value: a view of `base`, which holds elements; offset and strides count elements."""

    base: np.ndarray
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    space: str
    name: str

    def view(self) -> np.ndarray:
        """The elements as a NumPy view; HIVMError where one lies outside the memory it is in."""
        if 0 in self.shape:
            return np.empty(self.shape, self.base.dtype)
        reach = [(n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)]
        low = self.offset + sum(r for r in reach if r < 0)
        high = self.offset + sum(r for r in reach if r > 0)
        if low < 0 or high >= self.base.size:
            raise HIVMError(f"elements {low} to {high} of {self.name} ({self.space}), which has {self.base.size}")
        size = self.base.itemsize
        # Not as_strided: it does not know every element type of ml_dtypes.
        return np.ndarray(
            self.shape, self.base.dtype, self.base.view(np.uint8), self.offset * size, [s * size for s in self.strides]
        )

    def reinterpret(self, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Buffer:
        return replace(self, offset=offset, shape=shape, strides=strides)

    def subview(self, offsets: list[int], sizes: list[int], steps: list[int], rank: int, unit: list[bool]) -> Buffer:
        """A part; extents of 1 that are static (`unit`) are left out until `rank` is met."""
        offset = self.offset + sum(o * s for o, s in zip(offsets, self.strides, strict=True))
        kept, drop = [], len(sizes) - rank
        for i in range(len(sizes)):
            if drop and unit[i]:
                drop -= 1
            else:
                kept.append(i)
        if drop:
            raise HIVMError(f"subview of {self.name}: rank {rank} from extents {sizes}")
        strides = tuple(self.strides[i] * steps[i] for i in kept)
        return replace(self, offset=offset, shape=tuple(sizes[i] for i in kept), strides=strides)

    def collapse(self, groups: list[list[int]]) -> Buffer:
        shape, strides = [], []
        for group in groups:
            long = [i for i in group if self.shape[i] != 1]
            for a, b in itertools.pairwise(long):
                if self.strides[a] != self.strides[b] * self.shape[b]:
                    raise HIVMError(f"collapse of {self.name}: extents {self.shape} with strides {self.strides}")
            shape.append(math.prod(self.shape[i] for i in group))
            strides.append(self.strides[long[-1]] if long else 1)
        return replace(self, shape=tuple(shape), strides=tuple(strides))

    def expand(self, groups: list[list[int]], shape: tuple[int, ...]) -> Buffer:
        strides = [0] * len(shape)
        for i, group in enumerate(groups):
            stride = self.strides[i]
            for j in reversed(group):
                strides[j] = stride
                stride *= shape[j]
        return replace(self, shape=shape, strides=tuple(strides))


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


class LocalMemories:
    """On-chip memories of one core. Every byte starts as 0xFF: NaN in every float format.

    Masks (``i1``) are packed on the device; here they lie beside the bytes, at eight times the address.
    """

    def __init__(self, device: Device) -> None:
        limits = device.limits
        sizes = {"ub": limits.unified_buffer, "cbuf": limits.l1, "cc": limits.l0c, "ca": limits.l0a, "cb": limits.l0b}
        self._bytes = {space: np.full(size, 0xFF, np.uint8) for space, size in sizes.items()}
        self._masks: dict[str, np.ndarray] = {}

    def at(self, address: int, type_text: str) -> Buffer:
        """The buffer of a static memref type at an address; HIVMError where it does not fit."""
        kind = shaped(type_text)
        if kind.space not in self._bytes or None in kind.shape:
            raise HIVMError(f"a buffer of type {type_text} at address {address}")
        memory, dtype = self._bytes[kind.space], dtype_of(kind.element)
        shape = tuple(n or 0 for n in kind.shape)
        size = math.prod(shape) * dtype.itemsize if kind.element != "i1" else -(-math.prod(shape) // 8)
        if address < 0 or address + size > memory.size:
            raise HIVMError(f"{kind.space} overflow: bytes {address} to {address + size} of {memory.size}")
        if kind.element == "i1":
            masks = self._masks.setdefault(kind.space, np.zeros(8 * memory.size, np.bool_))
            base = masks[8 * address : 8 * address + math.prod(shape)]
        else:
            base = memory[address : address + size].view(dtype)
        return Buffer(base, 0, shape, contiguous(shape), kind.space, f"the buffer at {address}")


def private(type_text: str) -> Buffer:
    """A buffer of a scalar core's stack, full of 0xFF."""
    kind = shaped(type_text)
    if None in kind.shape:
        raise HIVMError(f"a buffer of type {type_text}")
    shape, dtype = tuple(n or 0 for n in kind.shape), dtype_of(kind.element)
    base = np.full(math.prod(shape) * dtype.itemsize, 0xFF, np.uint8).view(dtype)
    return Buffer(base, 0, shape, contiguous(shape), kind.space or "stack", "a scalar buffer")
