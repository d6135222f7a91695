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


def machine() -> str:
    """Processor and the CPUs this process may use, as figures are quoted with."""
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


class Limits:
    """What the machine reached so far; both are measured anew, and the better value kept, by each `measure`.

    Attributes:
        bandwidth: bytes per second, all threads reading memory one after another.
        peak: floating-point operations per second, all threads multiplying and adding float32 in registers.

    Raises:
        ArtifactError: the library has no functions to measure them with.
    """

    def __init__(self, model: Model, path: str | os.PathLike[str]) -> None:
        read, multiply = (model.library_function(name) for name in (STREAM_READ, MATRIX_PEAK))
        if read is None or multiply is None:
            raise ArtifactError(f"{path}: expected functions that measure the machine, found none: compile it again")
        self.bandwidth = self.peak = 0.0
        steps = max(_LEAST_BYTES, _CACHES * largest_cache()) // (4 * _LINE * model.threads)
        buffer = aligned_zeros((model.threads, steps, _LINE), np.dtype(np.float32))
        buffer[...] = 1.0  # memory that was never written is one page of zeros, which stays in the cache
        factors = aligned_zeros((2,), np.dtype(np.float32))
        factors[:] = (0.999, 0.5)
        sums = tensor_over(aligned_zeros((model.threads, _VECTOR), np.dtype(np.float32)), "float32")
        self._read = _timed(read, tensor_over(buffer, "float32"), sums)
        self._bytes = buffer.nbytes
        self._multiply = _timed(multiply, tensor_over(factors, "float32"), _MULTIPLY_ADDS, sums)
        self._flops = 2.0 * _MULTIPLY_ADDS * model.threads

    def measure(self) -> None:
        """Measure once more."""
        self.bandwidth = max(self.bandwidth, self._bytes / min(self._read() for _ in range(_REPEATS)))
        self.peak = max(self.peak, self._flops / min(self._multiply() for _ in range(_REPEATS)))


def _timed(function: Callable[..., Any], *arguments: Any) -> Callable[[], float]:
    """Seconds of a call."""

    def call() -> float:
        start = time.perf_counter()
        function(*arguments)
        return time.perf_counter() - start

    return call
