"""The GPU as the device of a program: weights and caches in its memory, tokens in and logits out once a step."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from math import prod
from typing import Any

import numpy as np

from v4c.errors import InputError, UnsupportedError
from v4c.runtime import cuda_library
from v4c.runtime.cuda_caches import GPUCaches
from v4c.runtime.cuda_graph import TO_DEVICE, TO_HOST, RecordedStep, Stream, finish_default_stream
from v4c.runtime.cuda_side_stream import SideStream
from v4c.runtime.devices import CPU_MACHINE
from v4c.runtime.dtypes import DTYPES
from v4c.runtime.host_memory import HostTable
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


@cache
def first_gpu() -> GPU:
    """The GPU of this process. Its models share TVM's pool of memory, so their sessions take turns with each other."""
    return GPU()


class GPU:
    """The first GPU, its libraries loaded after TVM's runtime.

    Attributes:
        stream: of all kernels and copies, but for what compiled functions do on a side stream.

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
        self._device = self._ffi.device("cuda", 0)
        self.stream = Stream()
        self._side = SideStream(self.stream, self._device)
        self._lock = threading.RLock()

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """One session at a time, on the one stream: kernels and copies of all are in order.

        What compiled functions do on the side stream, they wait for themselves.
        """
        with self._lock, self._ffi.use_raw_stream(self._device, self.stream.handle.value), self._side.in_use():
            yield

    def settle(self) -> None:
        finish_default_stream()

    def step(self, function: Callable[..., Any], releases: Callable[[], int]) -> Callable[..., Any]:
        return RecordedStep(function, self.stream, releases)

    def empty(self, shape: Sequence[int], dtype: str, what: str) -> Any:
        """Memory of the GPU; InputError names ``what`` if there is not enough."""
        try:
            return self._allocate(self._ffi.Shape(shape), self._ffi.dtype(dtype), self._device, None)
        except Exception as error:
            nbytes = _nbytes(shape, dtype)
            raise InputError(f"{what}: expected {nbytes} bytes free on the GPU, found: {one_line(error)}") from error

    def weights(self, tensors: Sequence[Any], tables: Sequence[HostTable | None]) -> list[Any]:
        made = []
        with self.exclusive():
            for tensor, table in zip(tensors, tables, strict=True):
                if table is not None:
                    made.append(table.load(tuple(tensor.shape), str(tensor.dtype)))
                    continue
                dtype = str(tensor.dtype)
                made.append(self.empty(tensor.shape, dtype, "weights"))
                self.stream.copy(made[-1].data_ptr(), tensor.data_ptr(), _nbytes(tensor.shape, dtype), TO_DEVICE)
            self.stream.finish()
        return made

    def caches(self, specs: Sequence[CacheSpec], batch: int, max_context: int) -> GPUCaches:
        return GPUCaches(self, specs, batch, max_context)

    def mirror(self, array: np.ndarray, dtype: str) -> Any:
        return self.empty(array.shape, dtype, "inputs")

    def refresh(self, tensor: Any, array: np.ndarray) -> None:
        self.stream.copy(tensor.data_ptr(), array.ctypes.data, array.nbytes, TO_DEVICE)

    def fetch(self, tensor: Any) -> np.ndarray:
        array = aligned_zeros(tensor.shape, np.dtype(str(tensor.dtype)))
        self.stream.copy(array.ctypes.data, tensor.data_ptr(), array.nbytes, TO_HOST)
        self.stream.finish()
        return array


def _nbytes(shape: Sequence[int], dtype: str) -> int:
    return prod(shape) * DTYPES[dtype].storage.itemsize
