"""The tuner's child process: builds two schedules of a kernel and measures them in turns. It may crash or hang.

Requests come as lines of JSON on stdin, answers go as such to stdout; `tune_process` is the other side. What libraries
print goes to stderr.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any, BinaryIO

from v4c.passes.relax.kernels import Kernel

from ..scheduler import Tunable, named
from .kernels.pair_product import with_instruction
from .scheduling import BY_NAME, tunable
from .stack import on_stack
from .target import CPUTarget
from .tune_data import Calls, fewer_experts

SAMPLE_SECONDS = 2e-4
"""Calls shorter than this are timed together."""
LEAST_ROUNDS, MOST_ROUNDS = 7, 400


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer every request until there are no more."""
    for line in requests:
        try:
            answer = measure(**json.loads(line))
        except Exception as error:  # whatever a schedule provokes in TVM is that trial's result
            text = " ".join(str(error).split()) or "no message"
            answer = {"failed": f"{type(error).__name__}: {text[:200]}"}
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


def measure(
    op: str, arguments: list[Any], level: str, default: Mapping[str, int], candidate: Mapping[str, int],
    rows: list[int], seconds: float,
) -> dict[str, Any]:  # fmt: skip
    """Times of two schedules of one kernel.

    Args:
        op: name of the kernel's factory.
        arguments: its arguments.
        level: x86-64 level.
        default, candidate: the numbers of both schedules.
        rows: row counts to measure.
        seconds: to spend on each of them.

    Returns:
        ``default_us`` and ``candidate_us``: medians in microseconds by row count as text; ``ratio``: candidate over
        default, as `cautious_ratio` has it; ``wins``: the share of rounds that the candidate wins.
    """
    times: dict[str, dict[str, float]] = {"default_us": {}, "candidate_us": {}, "ratio": {}, "wins": {}}
    for count in rows:
        call, data = _built(op, json.dumps(arguments), level, json.dumps(default), count)
        other, _ = _built(op, json.dumps(arguments), level, json.dumps(candidate), count)
        before, after = race(partial(_next, call, data), partial(_next, other, data), seconds)
        key = str(count)
        times["default_us"][key] = statistics.median(before) * 1e6
        times["candidate_us"][key] = statistics.median(after) * 1e6
        times["ratio"][key] = cautious_ratio(before, after)
        times["wins"][key] = sum(b < a for a, b in zip(before, after, strict=True)) / len(before)
    return times


def cautious_ratio(before: Sequence[float], after: Sequence[float]) -> float:
    """The larger of two ratios of times: the median within a round, and that of the fastest tenths.

    Where other programs use the cores, medians favour whatever starts fewer threads; the fastest calls are those that
    were left alone. A schedule has to be better by both.
    """
    within = statistics.median(b / a for a, b in zip(before, after, strict=True))
    tenth = max(1, len(before) // 10)
    return max(within, statistics.mean(sorted(after)[:tenth]) / statistics.mean(sorted(before)[:tenth]))


def _next(function: Callable[..., Any], calls: Calls) -> None:
    function(*calls.next())


def race(one: Callable[[], Any], two: Callable[[], Any], seconds: float) -> tuple[list[float], list[float]]:
    """Seconds per call of both, in turns, each first in every other round."""
    calls = (one, two)
    for call in calls:
        call()
    longest = max(_timed(call, 1) for call in calls)
    number = max(1, round(SAMPLE_SECONDS / longest))
    rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, round(seconds / (2 * number * longest))))
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(rounds):
        for which in (0, 1) if i % 2 == 0 else (1, 0):
            times[which].append(_timed(calls[which], number))
    return times


def _timed(call: Callable[[], Any], number: int) -> float:
    start = time.perf_counter()
    for _ in range(number):
        call()
    return (time.perf_counter() - start) / number


@cache
def _described(op: str, arguments: str, level: str) -> tuple[Tunable, dict[str, Any]]:
    restored = tuple(tuple(a) if isinstance(a, list) else a for a in json.loads(arguments))
    kernel = Kernel(BY_NAME[op], restored)
    found = tunable(kernel, level)
    assert found is not None
    return found, named(kernel)


_last: dict[tuple[Any, ...], Calls] = {}
_compiled: dict[tuple[Any, ...], Any] = {}


def _built(op: str, arguments: str, level: str, parameters: str, rows: int) -> tuple[Callable[..., Any], Calls]:
    """A compiled kernel as decode (one row, sizes constant) or prefill (any) has it, and arguments to call it with."""
    described, own = _described(op, arguments, level)
    fewer, scaled = fewer_experts(own, rows)
    kernel = described.with_arguments(fewer).scheduled(described.schedule(json.loads(parameters)))
    problem = (op, arguments, level)
    if any(key[:3] != problem for key in _last):  # another kernel's data and code are not needed any more
        _last.clear()
        _compiled.clear()
    built = (*problem, parameters, rows == 1)
    if built not in _compiled:
        function = kernel.build()
        if rows == 1:
            function = _one_row(function)
        _compiled[built] = (_compile(function, level), function)
    compiled, function = _compiled[built]
    if (*problem, rows) not in _last:
        _last[*problem, rows] = Calls(function, fewer, scaled)
    return compiled, _last[*problem, rows]


def _one_row(function: Any) -> Any:
    """The kernel with one row of one token, as `specialise_kernels` makes it for decode."""
    from tvm import tirx

    fixed = {}
    for param in function.params:
        names = [d.name if isinstance(d, tirx.Var) else "" for d in param.ty.shape]
        if {"rows", "b", "s"}.intersection(names):
            dims = [
                tirx.IntImm("int64", 1) if name in ("rows", "b", "s") else dim
                for name, dim in zip(names, param.ty.shape, strict=True)
            ]
            fixed[param] = tirx.decl_buffer(dims, str(param.ty.dtype), name=param.name)
    return function.specialize(fixed)


def _compile(function: Any, level: str) -> Callable[..., Any]:
    import tvm

    module = tvm.IRModule({"main": with_instruction(on_stack(function.with_attr("global_symbol", "main")))})
    return tvm.compile(module, target=CPUTarget(level).llvm())["main"]


def main() -> None:
    """Serve stdin and stdout; other output of this process goes to stderr."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
