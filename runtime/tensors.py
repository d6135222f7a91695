"""Memory shared between NumPy and TVM: aligned arrays, tensors over them without a copy, and results as arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from v4c.runtime.dtypes import DTYPES
from v4c.runtime.library import import_ffi
from v4c.runtime.manifest import ALIGNMENT


def aligned_zeros(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Zeros on a 64-byte boundary; large arrays cost no memory until a page is written (calloc)."""
    nbytes = math.prod(shape) * dtype.itemsize
    buffer = np.zeros(nbytes + ALIGNMENT, dtype=np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + nbytes].view(dtype).reshape(shape)


def tensor_over(array: np.ndarray, dtype: str) -> Any:
    """A TVM tensor of element type ``dtype`` over the memory of ``array``, which the tensor keeps alive.

    Args:
        array: writable, C-contiguous, on a 64-byte boundary, of the storage type of ``dtype``.
        dtype: a name in `DTYPES`.

    Raises:
        ValueError: ``array`` is not aligned or not contiguous.
    """
    ffi = import_ffi()
    tensor = ffi.from_dlpack(array, require_alignment=ALIGNMENT, require_contiguous=True)
    if DTYPES[dtype].storage.name == dtype:
        return tensor
    view = ffi.get_global_func("runtime.TVMTensorCreateView")
    return view(tensor, ffi.Shape(array.shape), ffi.dtype(dtype), 0)


def array_over(tensor: Any) -> np.ndarray:
    """A writable NumPy array over the memory of a result, which the array keeps alive."""
    return np.from_dlpack(tensor)
