"""The state of one session: a tensor per cache of the manifest, allocated lazily and copied sparingly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from v4c.errors import InputError
from v4c.runtime.cache_specs import CacheSpec
from v4c.runtime.dtypes import DTYPES
from v4c.runtime.tensors import aligned_zeros, tensor_over


class Caches:
    """Caches for ``batch`` rows of up to ``max_context`` tokens, each.

    Their content is never cleared: the compiled functions mask what lies before position 0 by arithmetic, so a row is
    reset by setting its position.

    Attributes:
        arrays: NumPy views in the manifest's order, in the storage types of their dtypes.
        tensors: TVM tensors over the same memory.

    Raises:
        InputError: there is not enough address space for them.
    """

    def __init__(self, specs: Sequence[CacheSpec], batch: int, max_context: int) -> None:
        self._specs = specs
        try:
            self.arrays = [aligned_zeros(s.sizes(batch, max_context), DTYPES[s.dtype].storage) for s in specs]
        except (MemoryError, ValueError) as error:
            raise InputError(f"batch {batch}, max_context {max_context}: caches do not fit in memory") from error
        self.tensors = [tensor_over(array, s.dtype) for array, s in zip(self.arrays, specs, strict=True)]
        self._rings = [array for array, s in zip(self.arrays, specs, strict=True) if s.ratio is None]

    def to_save(self, positions: np.ndarray) -> list[np.ndarray]:
        """The arrays themselves, as `to_fill`."""
        return self.arrays

    def to_fill(self, positions: np.ndarray) -> list[np.ndarray]:
        return self.arrays

    def copy_live(self, source: Caches, positions: np.ndarray) -> None:
        """Take over what ``source`` holds of rows that have read ``positions`` [B] tokens.

        Rings are copied whole; of a cache that grows with the context, only the rows written so far.
        """
        for spec, target, origin in zip(self._specs, self.arrays, source.arrays, strict=True):
            for row, position in enumerate(positions):
                if spec.ratio is not None:
                    written = int(position) // spec.ratio
                    target[row, :written] = origin[row, :written]
                elif position > 0:
                    target[row] = origin[row]

    def ring_rows(self, positions: np.ndarray) -> list[np.ndarray]:
        """Copies of what the rings hold in the slots of tokens at ``positions`` [B, n], a [B, n, ...] for each ring.

        Reading a token writes, of a ring, the slot ``position mod size``, and nothing else.
        """
        rows = np.arange(len(positions))[:, None]
        return [array[rows, positions % array.shape[1]] for array in self._rings]

    def restore_ring_rows(self, positions: np.ndarray, saved: Sequence[np.ndarray], wanted: np.ndarray) -> None:
        """Put back what `ring_rows` copied for ``positions``, where ``wanted`` [B, n] is true."""
        rows, columns = np.nonzero(wanted)
        if not rows.size:
            return
        slots = positions[rows, columns]
        for array, copies in zip(self._rings, saved, strict=True):
            array[rows, slots % array.shape[1]] = copies[rows, columns]

    def repeat(self, positions: np.ndarray, position: int) -> None:
        """Fill caches that grow to ``position`` tokens with the rows written so far, over and over.

        ``positions`` [B]: tokens each row has read.
        """
        for spec, array in zip(self._specs, self.arrays, strict=True):
            if spec.ratio is None:
                continue
            for row, read in enumerate(positions):
                written, end = int(read) // spec.ratio, position // spec.ratio
                for start in range(written, end if written else 0, written or 1):
                    piece = array[row, start : min(start + written, end)]
                    piece[...] = array[row, : len(piece)]
