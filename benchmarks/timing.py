"""Fair timing on a shared machine: candidates take turns in one run, and the medians of the turns are compared."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np


def interleaved(candidates: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Milliseconds of every call, candidates in turn: a slow spell of the machine hits all of them alike."""
    for _ in range(warmup):
        for call in candidates.values():
            call()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


def summary(times: list[float]) -> str:
    """Median and spread, e.g. ``12.3 ms (11.9-14.0)``."""
    low, high = np.percentile(times, [10, 90])
    return f"{statistics.median(times):.2f} ms ({low:.2f}-{high:.2f})"


def machine() -> str:
    """Processor and core count, as figures are quoted with."""
    name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    cores = sum(line.startswith("processor") for line in Path("/proc/cpuinfo").read_text().splitlines())
    return f"{name}, {cores} cores"
