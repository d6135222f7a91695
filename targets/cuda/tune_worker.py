"""The tuner's child process on a GPU: builds two schedules of a kernel and measures them in turns. It may crash.

It speaks as the CPU's worker does (`v4c.targets.tune_process`): lines of JSON.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, BinaryIO

from v4c.passes.relax.kernels import Kernel

from .architectures import find
from .measure import Bench
from .scheduling import BY_NAME, tunable

ROUNDS = 9
CONTEXT_ROWS = 1024
"""Compressed rows that attention and indexer see."""


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer every request until there are no more."""
    for line in requests:
        try:
            answer = measure(**json.loads(line))
        except Exception as error:  # whatever a schedule provokes is that trial's result
            text = " ".join(str(error).split()) or "no message"
            answer = {"failed": f"{type(error).__name__}: {text[:200]}"}
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


@cache
def bench(architecture: str) -> Bench:
    """The GPU."""
    return Bench(find(architecture))


def measure(
    op: str, arguments: list[Any], level: str, default: Mapping[str, int], candidate: Mapping[str, int],
    rows: list[int], seconds: float, on: Callable[[str], Bench] = bench,
) -> dict[str, Any]:  # fmt: skip
    """Times of two schedules of one kernel; arguments and result as of `v4c.targets.cpu.tune_worker.measure`."""
    sizes = tuple(tuple(a) if isinstance(a, list) else a for a in arguments)
    found = tunable(Kernel(BY_NAME[op], sizes), level)
    assert found is not None
    device = on(level)
    times: dict[str, dict[str, float]] = {"default_us": {}, "candidate_us": {}, "ratio": {}, "wins": {}}
    for count in rows:
        dims = {"b": 1, "s": count, "m": count, "n": CONTEXT_ROWS}
        both = [device.calls(found.scheduled(found.schedule(p)), dims) for p in (default, candidate)]
        # In turns, and each first as often as the other: clocks and caches drift.
        pairs = []
        for number in range(ROUNDS):
            order = (0, 1) if number % 2 == 0 else (1, 0)
            taken = {which: device.milliseconds(both[which], seconds / ROUNDS) for which in order}
            pairs.append((taken[0], taken[1]))
        key = str(count)
        times["default_us"][key] = 1e3 * statistics.median(a for a, _ in pairs)
        times["candidate_us"][key] = 1e3 * statistics.median(b for _, b in pairs)
        times["ratio"][key] = statistics.median(b / a for a, b in pairs)
        times["wins"][key] = sum(b < a for a, b in pairs) / len(pairs)
    return times


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)
