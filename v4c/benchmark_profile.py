"""From the calls of profiled steps to a table of kernels, each against the machine's limit, and to a Chrome trace."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from v4c.benchmark_limits import Limits
from v4c.errors import OutputError
from v4c.passes.cost import Cost, cost_of
from v4c.runtime.profile import Argument, Call

BETWEEN = "between kernels"
"""The row for the rest of a step: Python, the virtual machine, and waiting for threads to start."""

Kernels = Mapping[str, Sequence[Any]]
"""The manifest's table: kernel to its operator, the number of its inputs, and of its own memory's arguments."""


@dataclass(frozen=True)
class Launch:
    """One call of a kernel in a step.

    Attributes:
        call: its place among all calls of the step.
        kernel, op: its name, and the operator it computes; empty for loops that TVM made.
        cost: what it must move and compute.
    """

    call: int
    kernel: str
    op: str
    cost: Cost


def launches(
    calls: Sequence[Call], arguments: Sequence[Sequence[Argument]], kernels: Kernels, capacity: int | None = None
) -> list[Launch]:
    """The calls of kernels among the `calls` of a step, whose arguments a step like it was given.

    `capacity` is that of the session's caches, in tokens.
    """
    found = []
    for index, (call, given) in enumerate(zip(calls, arguments, strict=True)):
        if call.name in kernels:
            op, inputs, *own = kernels[call.name]
            outputs = given[inputs : len(given) - sum(own)]
            found.append(Launch(index, call.name, op, cost_of(op, given[:inputs], outputs, capacity)))
    return found


def rows(
    made: Sequence[Launch], steps: Sequence[Sequence[Call]], step_ms: float, limits: Limits
) -> list[dict[str, Any]]:
    """A row per kernel and one for what lies between, by what could still be won, largest first.

    Args:
        made: the launches of a step.
        steps: calls of profiled steps; a launch counts with its median, so that waiting for another process, which
            happens to one launch or another, does not count as a kernel's work.
        step_ms: a step without the profiler; what the kernels leave of it lies between them.
        limits: the machine's.
    """
    table: dict[str, dict[str, Any]] = {}
    for launch in made:
        row = table.setdefault(launch.kernel, {
            "kernel": launch.kernel, "op": launch.op, "calls": 0, "ms": 0.0, "bytes": 0.0, "flops": 0.0,
        })  # fmt: skip
        row["calls"] += 1
        row["ms"] += statistics.median(step[launch.call].ns for step in steps) / 1e6
        row["bytes"] += launch.cost.bytes
        row["flops"] += launch.cost.flops
    rest = step_ms - sum(row["ms"] for row in table.values())
    table[BETWEEN] = {
        "kernel": BETWEEN, "op": "", "calls": len(made), "ms": max(0.0, rest), "bytes": 0.0, "flops": 0.0,
    }  # fmt: skip
    for row in table.values():
        row.update(against(row["ms"], row["bytes"], row["flops"], limits), share=row["ms"] / step_ms)
    return sorted(table.values(), key=lambda row: -row["winnable_ms"])


def typical(steps: Sequence[Sequence[Call]], made: Sequence[Launch]) -> Sequence[Call]:
    """The step whose kernels took the median time together."""
    ordered = sorted(steps, key=lambda step: sum(step[launch.call].ns for launch in made))
    return ordered[len(ordered) // 2]


def against(ms: float, moved: float, flops: float, limits: Limits) -> dict[str, Any]:
    """A time against the machine's limits.

    `bandwidth_share` and `peak_share`, what was reached of each; `limit`, the one that binds; `winnable_ms`, the time
    above it. A share can exceed 1 where data comes from the processor's caches.
    """
    by_bandwidth, by_peak = moved / limits.bandwidth * 1e3, flops / limits.peak * 1e3
    return {
        "bandwidth_share": by_bandwidth / ms if ms else 0.0,
        "peak_share": by_peak / ms if ms else 0.0,
        "limit": "bandwidth" if by_bandwidth >= by_peak else "arithmetic",
        "winnable_ms": max(0.0, ms - max(by_bandwidth, by_peak)),
    }


def write_trace(path: Path, steps: Mapping[str, tuple[Sequence[Call], Sequence[Launch]]]) -> None:
    """A file for chrome://tracing or Perfetto: for each step, by name, a track with its functions and kernels.

    Raises:
        OutputError: it cannot be written.
    """
    events: list[dict[str, Any]] = []
    for track, (name, (calls, made)) in enumerate(steps.items(), start=1):
        events.append({"name": "thread_name", "ph": "M", "pid": 1, "tid": track, "args": {"name": name}})
        by_call = {launch.call: launch for launch in made}
        first = calls[0].start if calls else 0
        for index, call in enumerate(calls):
            launch = by_call.get(index)
            notes: dict[str, Any] = {}
            if launch is not None:
                notes = {"op": launch.op, "bytes": launch.cost.bytes, "flops": launch.cost.flops}
            events.append({
                "name": call.name, "cat": "kernel" if launch else "function", "ph": "X", "pid": 1, "tid": track,
                "ts": (call.start - first) / 1e3, "dur": call.ns / 1e3, "args": notes,
            })  # fmt: skip
    try:
        path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ns"}) + "\n")
    except OSError as error:
        raise OutputError(f"{path}: expected to write the trace, found {error.strerror}") from None
