"""Times a kernel on this machine's GPU: CUDA events, medians, random data, inputs that do not stay in its cache."""

from __future__ import annotations

import contextlib
import ctypes
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from v4c.errors import Error
from v4c.passes.relax.kernels import Kernel
from v4c.runtime import cuda_library
from v4c.runtime.cuda_graph import Stream

from . import toolchain
from .architectures import Architecture
from .device_module import load_runtime, machine_code
from .launch import SCRATCH
from .target import CUDATarget

CACHE_BYTES = 128 << 20
"""More than any chip's second-level cache: sets of inputs together take at least twice this where they can."""
_MOST_SETS = 64


@dataclass(frozen=True)
class Call:
    """A kernel and the tensors of one call, on the device."""

    function: Callable[..., Any]
    tensors: Sequence[Any]

    def __call__(self) -> None:
        self.function(*self.tensors)


class Bench:
    """The first GPU, made ready for kernels of one architecture.

    Raises:
        UnsupportedError: a library or the GPU is missing.
    """

    def __init__(self, architecture: Architecture, compiler: Callable[[str], Any] | None = None) -> None:
        cuda_library.find_device()
        load_runtime()
        self.architecture = architecture
        self._compiler = compiler or partial(toolchain.compile_source, architecture=architecture)
        self._runtime = cuda_library.open_runtime()
        self.stream = Stream()

    @contextlib.contextmanager
    def on_stream(self) -> Iterator[None]:
        """Launches go to this object's stream."""
        import tvm
        import tvm_ffi

        with tvm_ffi.use_raw_stream(tvm.cuda(0), int(self.stream.handle.value or 0)):
            yield

    def build(self, kernel: Kernel) -> tuple[Any, Callable[..., Any]]:
        """The PrimFunc, and the same compiled."""
        import tvm

        function = kernel.build().with_attr("global_symbol", "main")
        with machine_code(self._compiler):
            target = CUDATarget(self.architecture).tvm_target()
            return function, tvm.compile(tvm.IRModule({"main": function}), target=target)["main"]

    def calls(self, kernel: Kernel, sizes: Mapping[str, int], seed: int = 0) -> list[Call]:
        """Calls of one kernel on as many sets of random inputs as outgrow the cache.

        Args:
            kernel: what to call.
            sizes: its symbolic dimensions by name: ``b`` rows, ``s`` tokens, ``m`` both at once, ``n`` compressed rows.
            seed: of the data.
        """
        function, compiled = self.build(kernel)
        shapes = [_shape(p, sizes) for p in function.params]
        own = int(function.attrs[SCRATCH])
        nbytes = sum(int(np.prod(shape)) * _itemsize(dtype) for shape, dtype in shapes)
        sets = int(min(_MOST_SETS, max(1, -(-2 * CACHE_BYTES // max(nbytes, 1)))))
        made = []
        for number in range(sets):
            random = np.random.default_rng(seed + number)
            tensors = []
            for index, (param, (shape, dtype)) in enumerate(zip(function.params, shapes, strict=True)):
                fill = index < len(shapes) - own
                tensors.append(
                    _tensor(_values(param.name, shape, dtype, sizes, function, random) if fill else None, shape, dtype)
                )
            made.append(Call(compiled, tensors))
        return made

    def milliseconds(self, calls: Sequence[Callable[[], Any]], seconds: float = 0.5) -> float:
        """Median time of one call, each in its turn."""
        with self.on_stream():
            for call in calls:
                call()
            once = max(self._elapsed(calls), 1e-6)
            rounds = int(min(200, max(7, seconds * 1e3 / once)))
            return statistics.median(self._elapsed(calls) for _ in range(rounds)) / len(calls)

    def _elapsed(self, calls: Sequence[Callable[[], Any]]) -> float:
        first, last = ctypes.c_void_p(), ctypes.c_void_p()
        for event in (first, last):
            self._check(self._runtime.cudaEventCreate(ctypes.byref(event)))
        try:
            self._check(self._runtime.cudaEventRecord(first, self.stream.handle))
            for call in calls:
                call()
            self._check(self._runtime.cudaEventRecord(last, self.stream.handle))
            self._check(self._runtime.cudaEventSynchronize(last))
            time = ctypes.c_float()
            self._check(self._runtime.cudaEventElapsedTime(ctypes.byref(time), first, last))
            return time.value
        finally:
            for event in (first, last):
                self._runtime.cudaEventDestroy(event)

    @staticmethod
    def _check(error: int) -> None:
        if error:
            raise Error(f"CUDA events: expected success, found CUDA error {error}")


def _itemsize(dtype: str) -> int:
    from v4c.runtime.dtypes import DTYPES

    return DTYPES[dtype].storage.itemsize if dtype in DTYPES else np.dtype(dtype).itemsize


def _shape(param: Any, sizes: Mapping[str, int]) -> tuple[tuple[int, ...], str]:
    from tvm import sym, tirx

    shape = []
    for dim in param.ty.shape:
        analyzer = sym.Analyzer()
        for variable in _variables(dim):
            analyzer.bind(variable, tirx.IntImm("int64", sizes[variable.name]))
        shape.append(int(analyzer.simplify(dim)))
    return tuple(shape), str(param.ty.dtype)


def _variables(dim: Any) -> list[Any]:
    from tvm import tirx

    if isinstance(dim, tirx.Var):
        return [dim]
    return [v for side in ("a", "b") if hasattr(dim, side) for v in _variables(getattr(dim, side))]


def _values(
    name: str, shape: tuple[int, ...], dtype: str, sizes: Mapping[str, int], function: Any, random: np.random.Generator
) -> np.ndarray:
    """Random values that an argument of that name may have; rows stand behind as many tokens as fill the caches."""
    if name == "positions":
        return np.full(shape, max(sizes.get("n", 1) * sizes.get("ratio", 4) - sizes["s"], 0))
    if name == "lengths":
        return np.full(shape, sizes["s"])
    if dtype.startswith("int"):
        buffers = {p.name: p.ty.shape for p in function.params}
        most = int(buffers["gate_up"][0]) if "gate_up" in buffers else sizes.get("n", 1)
        keys = random.random((*shape[:-1], most)).argsort(-1)[..., : shape[-1]]
        return np.resize(keys, shape)  # different ones, as far as there are enough
    if dtype == "uint8":  # as codes some tenths, as scales of either kind small
        return random.integers(0x30, 0x40, shape, np.uint8)
    return random.standard_normal(shape, dtype=np.float32) / 8


def _tensor(values: np.ndarray | None, shape: tuple[int, ...], dtype: str) -> Any:
    import tvm

    from v4c.runtime.dtypes import DTYPES
    from v4c.runtime.tensors import aligned_zeros, tensor_over

    tensor = tvm.runtime.empty(shape, dtype, tvm.cuda(0))
    if values is None:
        return tensor
    if dtype == "bfloat16":
        import ml_dtypes

        host = aligned_zeros(shape, DTYPES[dtype].storage)
        host[...] = values.astype(ml_dtypes.bfloat16).view(host.dtype)
        tensor_over(host, dtype).copyto(tensor)
    else:
        tensor.copyfrom(values.astype(dtype))
    return tensor
