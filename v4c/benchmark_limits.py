"""The machine a benchmark runs on: its name, and how fast it reads memory and multiplies, by the library's own code."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from v4c.errors import ArtifactError
from v4c.passes.cost import MATRIX_PEAK, STREAM_READ
from v4c.runtime.cuda import GPU
from v4c.runtime.cuda_library import find_device
from v4c.runtime.model import Model
from v4c.runtime.tensors import aligned_zeros, tensor_over

_LEAST_BYTES = 1 << 29
_CACHES = 8
"""The buffer that is read is at least this large, and this many times the largest cache: of a quarter of it, a shared
machine sometimes kept so much in caches that it seemed to read twice as fast."""
_LINE = 64
_VECTOR = 16
"""Sizes in the functions' arguments: floats in a line, and in a sum."""
_MULTIPLY_ADDS = 960 << 18
"""Per thread and call: some milliseconds, and a multiple of what any level does at once."""
_REPEATS = 6
"""The best of so many counts: on a busy machine most are interrupted."""

_GPU_BYTES, _LAUNCHES = 1 << 30, 10
"""What is read on a GPU, several times the largest cache of any, and launches that are timed together."""
_BLOCKS, _GPU_THREADS, _ROUNDS = 4, 256, 512
"""Blocks per processor of the chip and their threads, and rounds of products in each warp."""
_PRODUCTS, _PRODUCT_FLOPS = 8, 2 * 16 * 8 * 16
"""Of a round, and operations of one."""

Function = Callable[..., Any]
Rate = Callable[[], float]
"""Measures bytes or operations per second."""


def machine(model: Model | None = None) -> str:
    """Processor and the CPUs this process may use, or the GPU that `model` runs on, as figures are quoted with."""
    if model is not None and model.on_gpu:
        gpu = find_device()
        return f"{gpu.name}, {gpu.processors} processors"
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, name)}, {len(os.sched_getaffinity(0))} CPUs"


def largest_cache() -> int:
    """Bytes of the largest data cache that Linux lists for the first CPU; 0 where it lists none."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [file.read_text().strip() for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=0)


def limits_of(model: Model, path: str | os.PathLike[str]) -> Limits:
    """The limits of what a model runs on; ArtifactError if its library has no functions to measure them with."""
    return GPULimits(model, path) if model.on_gpu else HostLimits(model, path)


class Limits:
    """What the machine reached so far; both are measured anew, and the better value kept, by each `measure`.

    Attributes:
        bandwidth: bytes per second, all threads reading memory one after another.
        peak: floating-point operations per second, all threads multiplying and adding float32 in registers.
    """

    bandwidth = peak = 0.0

    def __init__(self, model: Model, path: str | os.PathLike[str]) -> None:
        read, multiply = (model.library_function(name) for name in (STREAM_READ, MATRIX_PEAK))
        if read is None or multiply is None:
            raise ArtifactError(f"{path}: expected functions that measure the machine, found none: compile it again")
        self._read, self._multiply = self._calls(model, read, multiply)

    def _calls(self, model: Model, read: Function, multiply: Function) -> tuple[Rate, Rate]:
        """Two functions that do what they are named after and return the rate they reached."""
        raise NotImplementedError

    def measure(self) -> None:
        """Measure once more."""
        self.bandwidth = max(self.bandwidth, *(self._read() for _ in range(_REPEATS)))
        self.peak = max(self.peak, *(self._multiply() for _ in range(_REPEATS)))


class HostLimits(Limits):
    """Of the processor: reading with all its threads, and float32 multiply-adds."""

    def _calls(self, model: Model, read: Function, multiply: Function) -> tuple[Rate, Rate]:
        steps = max(_LEAST_BYTES, _CACHES * largest_cache()) // (4 * _LINE * model.threads)
        buffer = aligned_zeros((model.threads, steps, _LINE), np.dtype(np.float32))
        buffer[...] = 1.0  # memory that was never written is one page of zeros, which stays in the cache
        factors = aligned_zeros((2,), np.dtype(np.float32))
        factors[:] = (0.999, 0.5)
        sums = tensor_over(aligned_zeros((model.threads, _VECTOR), np.dtype(np.float32)), "float32")
        everything, both = tensor_over(buffer, "float32"), tensor_over(factors, "float32")
        return (
            lambda: buffer.nbytes / _seconds(lambda: read(everything, sums)),
            lambda: 2.0 * _MULTIPLY_ADDS * model.threads / _seconds(lambda: multiply(both, _MULTIPLY_ADDS, sums)),
        )


class GPULimits(Limits):
    """Of a GPU: reading with all its processors, and bfloat16 products on its tensor cores by ``mma.sync``."""

    def _calls(self, model: Model, read: Function, multiply: Function) -> tuple[Rate, Rate]:
        device, blocks = model.device, _BLOCKS * find_device().processors
        assert isinstance(device, GPU)
        buffer = device.empty((_GPU_BYTES // 16, 4), "float32", "buffer to measure the GPU with")
        rounds = device.empty((_ROUNDS,), "float32", "buffer to measure the GPU with")
        sums = device.empty((blocks, _GPU_THREADS), "float32", "buffer to measure the GPU with")

        def seconds(call: Callable[[], Any]) -> float:
            """Of one of several launches in a row: a launch alone waits longer than it works."""

            def launches() -> None:
                for _ in range(_LAUNCHES):
                    call()
                device.fetch(sums)

            with device.exclusive():
                return _seconds(launches) / _LAUNCHES

        flops = blocks * _GPU_THREADS / 32 * _ROUNDS * _PRODUCTS * _PRODUCT_FLOPS
        return (
            lambda: _GPU_BYTES / seconds(lambda: read(buffer, sums)),
            lambda: flops / seconds(lambda: multiply(rounds, sums)),
        )


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
