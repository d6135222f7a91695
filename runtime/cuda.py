"""The GPU as the device of a program: weights and caches in its memory, tokens in and logits out once a step."""

from __future__ import annotations

import contextlib
import ctypes
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from v4c.errors import InputError, UnsupportedError
from v4c.runtime import cuda_library
from v4c.runtime.cuda_graph import RecordedStep, Stream
from v4c.runtime.devices import CPU_MACHINE
from v4c.runtime.dtypes import DTYPES
from v4c.runtime.library import import_ffi, one_line
from v4c.runtime.manifest import CacheSpec
from v4c.runtime.tensors import aligned_zeros

_CUDA = 2  # DLPack's device type
_POOLED = 2


def check_device(target: str) -> None:
    """Refuse a machine whose GPU cannot run code made for ``target``, such as ``cuda:sm_90a``.

    Machine code runs on the generation it was made for; newer chips translate the PTX beside it.

    Raises:
        UnsupportedError: there is no driver or no GPU, or it is too old.
    """
    device = cuda_library.find_device()
    found = re.fullmatch(r"cuda:sm_(\d+)(\d)[af]?", target)
    if found is None:
        raise UnsupportedError(f"target {target}: expected cuda:sm_ and a number, which this runtime knows")
    needed = (int(found[1]), int(found[2]))
    if device.capability < needed:
        have = ".".join(map(str, device.capability))
        raise UnsupportedError(
            f"target {target}: expected a GPU of compute capability {needed[0]}.{needed[1]} or newer, found {have} "
            f"({device.name}): recompile for it"
        )


class GPU:
    """The first GPU, its libraries loaded after TVM's runtime.

    Raises:
        UnsupportedError: one of the libraries is missing; the message names it.
    """

    machine = (_CUDA, 0, _POOLED, *CPU_MACHINE)

    def __init__(self) -> None:
        cuda_library.open_driver()
        cuda_library.open_runtime()
        cuda_library.open_tvm()
        self._ffi = import_ffi()
        function = self._ffi.get_global_func
        self._allocate = function("runtime.TVMTensorAllocWithScope")
        self._copy, self._view = function("runtime.TVMTensorCopyFromTo"), function("runtime.TVMTensorCreateView")
        self._upload, self._download = (
            function("runtime.TVMTensorCopyFromBytes"), function("runtime.TVMTensorCopyToBytes"),
        )  # fmt: skip
        self._device = self._ffi.device("cuda", 0)
        self._stream = Stream()
        self._lock = threading.RLock()

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """One session at a time, on the one stream: kernels and copies of all are in order."""
        with self._lock, self._ffi.use_raw_stream(self._device, self._stream.handle.value):
            yield

    def step(self, function: Callable[..., Any], releases: Callable[[], int]) -> Callable[..., Any]:
        return RecordedStep(function, self._stream, releases)

    def empty(self, shape: Sequence[int], dtype: str, what: str) -> Any:
        """Memory of the GPU; InputError names ``what`` if there is not enough."""
        try:
            return self._allocate(self._ffi.Shape(shape), self._ffi.dtype(dtype), self._device, None)
        except Exception as error:
            nbytes = int(np.prod(shape)) * DTYPES[dtype].storage.itemsize
            raise InputError(f"{what}: expected {nbytes} bytes free on the GPU, found: {one_line(error)}") from error

    def weights(self, tensors: Sequence[Any]) -> list[Any]:
        made = []
        with self.exclusive():
            for tensor in tensors:
                made.append(self.empty(tensor.shape, str(tensor.dtype), "weights"))
                self._copy(tensor, made[-1])
        return made

    def caches(self, specs: Sequence[CacheSpec], batch: int, max_context: int) -> GPUCaches:
        return GPUCaches(self, specs, batch, max_context)

    def mirror(self, array: np.ndarray, dtype: str) -> Any:
        return self.empty(array.shape, dtype, "inputs")

    def refresh(self, tensor: Any, array: np.ndarray) -> None:
        self._upload(tensor, ctypes.c_void_p(array.ctypes.data), array.nbytes)

    def fetch(self, tensor: Any) -> np.ndarray:
        array = aligned_zeros(tensor.shape, np.dtype(str(tensor.dtype)))
        self._download(tensor, ctypes.c_void_p(array.ctypes.data), array.nbytes)
        return array

    def copy_rows(self, source: Any, target: Any, dtype: str, first: tuple[int, int], rows: int) -> None:
        """Copy ``rows`` rows (axis 1) within one batch row (axis 0).

        Args:
            source, target: tensors [B, rows, ...] of ``dtype``, equal behind axis 1; may be the same.
            first: batch row and first row, in both.
            rows: how many.
        """
        self.move_rows(source, target, dtype, (*first, first[1]), rows)

    def move_rows(self, source: Any, target: Any, dtype: str, places: tuple[int, int, int], rows: int) -> None:
        """As `copy_rows`, from and to different rows: ``places`` are batch row, first source and first target row."""
        if rows == 0:
            return
        item, from_row, to_row = places
        width = int(np.prod(source.shape[2:], dtype=np.int64)) * DTYPES[dtype].storage.itemsize
        shape = self._ffi.Shape((rows, *source.shape[2:]))

        def part(tensor: Any, row: int) -> Any:
            return self._view(tensor, shape, self._ffi.dtype(dtype), (item * tensor.shape[1] + row) * width)

        self._copy(part(source, from_row), part(target, to_row))


def _on_gpu(purpose: str) -> UnsupportedError:
    return UnsupportedError(f"session: expected one on the processor {purpose}, found one on a GPU")


class GPUCaches:
    """As `v4c.runtime.caches.Caches`, in a GPU's memory, taken when the session is made.

    Raises:
        InputError: they do not fit.
    """

    def __init__(self, gpu: GPU, specs: Sequence[CacheSpec], batch: int, max_context: int) -> None:
        self._gpu, self._specs = gpu, specs
        what = f"batch {batch}, max_context {max_context}: caches"
        self.tensors = [gpu.empty(s.sizes(batch, max_context), s.dtype, what) for s in specs]

    @property
    def arrays(self) -> list[np.ndarray]:
        """What is saved and restored of a session on the processor; here an UnsupportedError."""
        raise _on_gpu("to save or restore")

    def ring_rows(self, positions: np.ndarray) -> Any:
        """What tokens are taken back with on the processor; here an UnsupportedError."""
        raise _on_gpu("to take tokens back")

    def restore_ring_rows(self, positions: np.ndarray, saved: Any, wanted: np.ndarray) -> None:
        """As `ring_rows`."""
        raise _on_gpu("to take tokens back")

    def copy_live(self, source: GPUCaches, positions: np.ndarray) -> None:
        for spec, target, origin in zip(self._specs, self.tensors, source.tensors, strict=True):
            for row, position in enumerate(positions):
                if spec.ratio is not None:
                    self._gpu.copy_rows(origin, target, spec.dtype, (row, 0), int(position) // spec.ratio)
                elif position > 0:
                    self._gpu.copy_rows(origin, target, spec.dtype, (row, 0), int(target.shape[1]))

    def repeat(self, positions: np.ndarray, position: int) -> None:
        for spec, tensor in zip(self._specs, self.tensors, strict=True):
            if spec.ratio is None:
                continue
            for row, read in enumerate(positions):
                written, end = int(read) // spec.ratio, position // spec.ratio
                while 0 < written < end:
                    rows = min(written, end - written)
                    self._gpu.move_rows(tensor, tensor, spec.dtype, (row, 0, written), rows)
                    written += rows
