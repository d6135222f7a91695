"""Tables in host memory that kernels of a GPU read where they lie, a few rows at a time.

The memory is page-locked. With unified addressing, which every GPU of this target has, all host memory that the CUDA
runtime hands out "is always directly accessible from all devices", portable and mapped whatever flags it was asked for
with, and kernels reach it by the pointer that the processor uses (CUDA Runtime API, "Unified Addressing", section
"Automatic Mapping of Host Allocated Host Memory"). So a tensor is said to be on the GPU, and has that pointer.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from v4c.errors import InputError
from v4c.runtime.dtypes import DTYPES
from v4c.runtime.file_pieces import read_parts
from v4c.runtime.huge_pages import free_memory
from v4c.runtime.library import import_ffi, one_line

_CUDA, _CUDA_HOST = 2, 3  # DLPack's device types
_PIECE = 64 << 20
"""Bytes that a thread reads at a time."""


@dataclass(frozen=True)
class HostTable:
    """A weight that is to stay in host memory: its name, and where in which file its packed bytes begin."""

    name: str
    file: Path
    offset: int

    def load(self, shape: tuple[int, ...], dtype: str) -> Any:
        """The table as a tensor on the first GPU, its bytes read from the file straight into the memory it keeps.

        Raises:
            InputError: the host has not so much memory to give.
            ArtifactError: the file cannot be read.
        """
        nbytes = prod(shape) * DTYPES[dtype].storage.itemsize
        free = free_memory()
        if free is not None and nbytes > free:
            raise self._refused(nbytes, f"{free} free")
        try:
            tensor = _page_locked(shape, dtype)
        except Exception as error:
            raise self._refused(nbytes, one_line(error)) from error
        memory = np.frombuffer(memoryview((ctypes.c_uint8 * nbytes).from_address(tensor.data_ptr())), np.uint8)
        read_parts([(self.file, self.offset, memory)], _PIECE)
        return tensor

    def _refused(self, nbytes: int, found: str) -> InputError:
        return InputError(f"{self.name}: expected {nbytes} bytes of host memory for this table, found: {found}")


class _DLTensor(ctypes.Structure):
    """How a ``DLManagedTensor`` begins (DLPack, ``dlpack.h``)."""

    _fields_ = (("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32))


def _page_locked(shape: tuple[int, ...], dtype: str) -> Any:
    """A tensor of page-locked memory, on the first GPU by name; its last reference gives the memory back."""
    ffi = import_ffi()
    allocate = ffi.get_global_func("runtime.TVMTensorAllocWithScope")
    held = allocate(ffi.Shape(shape), ffi.dtype(dtype), ffi.device(_CUDA_HOST, 0), None)
    capsule = held.__dlpack__()  # a description of its own of the memory, which it keeps
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    _DLTensor.from_address(pointer(capsule, b"dltensor")).device_type = _CUDA
    return ffi.from_dlpack(capsule)
