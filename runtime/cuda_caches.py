"""The state of one session in a GPU's memory: copied there for forks, to the host for files, slot by slot to take back.

All copies are made on the stream of the kernels, in their order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from v4c.runtime.cache_specs import CacheSpec
from v4c.runtime.cuda_graph import TO_DEVICE, TO_HOST, WITHIN_DEVICE
from v4c.runtime.dtypes import DTYPES
from v4c.runtime.tensors import aligned_zeros

if TYPE_CHECKING:
    from v4c.runtime.cuda import GPU


class GPUCaches:
    """As `v4c.runtime.caches.Caches`; the memory is taken when the session is made.

    Raises:
        InputError: they do not fit.
    """

    def __init__(self, gpu: GPU, specs: Sequence[CacheSpec], batch: int, max_context: int) -> None:
        self._gpu, self._specs = gpu, specs
        what = f"batch {batch}, max_context {max_context}: caches"
        self.tensors = [gpu.empty(s.sizes(batch, max_context), s.dtype, what) for s in specs]

    def to_save(self, positions: np.ndarray) -> Iterator[np.ndarray]:
        """Copies, one cache at a time."""
        for spec, tensor in zip(self._specs, self.tensors, strict=True):
            array, rows = _host_array(spec, tensor, positions), _written(spec, tensor, positions)
            with self._gpu.exclusive():
                for row, count in enumerate(rows):
                    place = _place(spec, tensor, row)
                    self._gpu.stream.copy(array[row].ctypes.data, place, count * _width(spec, tensor), TO_HOST)
                self._gpu.stream.finish()
            yield array

    def to_fill(self, positions: np.ndarray) -> Iterator[np.ndarray]:
        """Arrays that are copied to the GPU when the next is asked for."""
        for spec, tensor in zip(self._specs, self.tensors, strict=True):
            array, rows = _host_array(spec, tensor, positions), _written(spec, tensor, positions)
            yield array
            with self._gpu.exclusive():
                for row, count in enumerate(rows):
                    place = _place(spec, tensor, row)
                    self._gpu.stream.copy(place, array[row].ctypes.data, count * _width(spec, tensor), TO_DEVICE)
                self._gpu.stream.finish()

    def ring_rows(self, positions: np.ndarray) -> Any:
        """A copy in the GPU's memory of the slots, ring by ring, of each the rows and of each its positions."""
        slots = list(self._slots(positions))
        held = self._gpu.empty((max(1, sum(width for *_, width in slots)),), "uint8", "tokens to take back")
        at = int(held.data_ptr())
        for _, _, place, width in slots:
            self._gpu.stream.copy(at, place, width, WITHIN_DEVICE)
            at += width
        return held

    def restore_ring_rows(self, positions: np.ndarray, saved: Any, wanted: np.ndarray) -> None:
        at = int(saved.data_ptr())
        for row, column, place, width in self._slots(positions):
            if wanted[row, column]:
                self._gpu.stream.copy(place, at, width, WITHIN_DEVICE)
            at += width

    def _slots(self, positions: np.ndarray) -> Iterator[tuple[int, int, int, int]]:
        """For each ring and place in ``positions`` [B, n]: that place, where the slot lies, and its bytes."""
        for spec, tensor in zip(self._specs, self.tensors, strict=True):
            if spec.ratio is None:
                for (row, column), position in np.ndenumerate(positions):
                    slot = int(position) % int(tensor.shape[1])
                    yield row, column, _place(spec, tensor, row, slot), _width(spec, tensor)

    def copy_live(self, source: GPUCaches, positions: np.ndarray) -> None:
        for spec, target, origin in zip(self._specs, self.tensors, source.tensors, strict=True):
            for row, count in enumerate(_written(spec, target, positions)):
                self._move(spec, (target, row, 0), (origin, row, 0), count)

    def repeat(self, positions: np.ndarray, position: int) -> None:
        for spec, tensor in zip(self._specs, self.tensors, strict=True):
            if spec.ratio is None:
                continue
            for row, read in enumerate(positions):
                written, end = int(read) // spec.ratio, position // spec.ratio
                while 0 < written < end:
                    rows = min(written, end - written)
                    self._move(spec, (tensor, row, written), (tensor, row, 0), rows)
                    written += rows

    def _move(self, spec: CacheSpec, to: tuple[Any, int, int], source: tuple[Any, int, int], rows: int) -> None:
        """Copy rows; places are a tensor, a row of the batch, and the first row of the cache there."""
        nbytes = rows * _width(spec, source[0])
        self._gpu.stream.copy(_place(spec, *to), _place(spec, *source), nbytes, WITHIN_DEVICE)


def _width(spec: CacheSpec, tensor: Any) -> int:
    """Bytes of a row of a cache."""
    return prod(tensor.shape[2:]) * DTYPES[spec.dtype].storage.itemsize


def _place(spec: CacheSpec, tensor: Any, item: int, row: int = 0) -> int:
    """Where a row lies in the memory of the GPU."""
    return int(tensor.data_ptr()) + (item * int(tensor.shape[1]) + row) * _width(spec, tensor)


def _written(spec: CacheSpec, tensor: Any, positions: np.ndarray) -> list[int]:
    """Rows of a cache that hold something, for each row of the batch; a ring's, all once there was a token."""
    if spec.ratio is not None:
        return [int(position) // spec.ratio for position in positions]
    return [int(tensor.shape[1]) if position > 0 else 0 for position in positions]


def _host_array(spec: CacheSpec, tensor: Any, positions: np.ndarray) -> np.ndarray:
    """Zeros for what `_written` counts, in the storage type: a ring whole, of a cache that grows the longest row's."""
    rows = int(tensor.shape[1]) if spec.ratio is None else max(_written(spec, tensor, positions))
    return aligned_zeros((len(positions), rows, *map(int, tensor.shape[2:])), DTYPES[spec.dtype].storage)
