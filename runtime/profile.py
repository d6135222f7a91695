"""Which calls a step of a session makes, and how long each takes: callbacks of TVM's virtual machine, made a record.

A callback takes time itself, a microsecond or two. Between the two readings of the clock for a call stand the return
from the first callback and the way into the second, which converts the arguments; `Call.ns` contains both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Any, NamedTuple

import numpy as np

from v4c.runtime.session import Session

_FEW = 64
"""Up to so many integers of a vector are noted: positions and lengths of rows."""


class Argument(NamedTuple):
    """Shape and dtype of a tensor that was passed, and its elements if it is a short vector of integers."""

    shape: tuple[int, ...]
    dtype: str
    values: tuple[int, ...] = ()


@dataclass(frozen=True)
class Call:
    """One call of a function, a kernel or a built-in of the virtual machine.

    Attributes:
        name: what was called.
        depth: how many calls it stands within.
        start: when it began, by `time.perf_counter_ns`.
        ns: how long it took, calls within it included.
    """

    name: str
    depth: int
    start: int
    ns: int


class Recorder:
    """Watches one session from now on."""

    def __init__(self, session: Session) -> None:
        self._events: list[tuple[str, bool, int]] = []
        self._arguments: list[tuple[Argument, ...]] = []
        self._session = session
        session.observe(self._time)

    def record_arguments(self) -> None:
        """Note the tensors that calls are given instead of the time they take."""
        self._session.observe(self._note)

    def record_times(self) -> None:
        """Note times again."""
        self._session.observe(self._time)

    def take_arguments(self) -> list[tuple[Argument, ...]]:
        """The tensors given to each call since the last time, in the order in which the calls began."""
        taken, self._arguments = self._arguments, []
        return taken

    def take(self) -> list[Call]:
        """The calls since the last time, in the order in which they began."""
        events = list(self._events)
        self._events.clear()
        calls: dict[int, Call] = {}
        running: list[tuple[int, int]] = []
        for name, before, now in events:
            if before:
                running.append((len(calls) + len(running), now))
            else:
                index, start = running.pop()
                calls[index] = Call(name, len(running), start, now - start)
        return [calls[index] for index in sorted(calls)]

    def _time(self, function: Any, name: str, before: bool, result: Any, *arguments: Any) -> None:
        self._events.append((name, before, perf_counter_ns()))

    def _note(self, function: Any, name: str, before: bool, result: Any, *arguments: Any) -> None:
        if before:
            tensors = (a for a in arguments if hasattr(a, "shape") and hasattr(a, "dtype"))
            self._arguments.append(tuple(_argument(tensor, self._session.fetch) for tensor in tensors))


def _argument(tensor: Any, fetch: Callable[[Any], np.ndarray]) -> Argument:
    shape, dtype = tuple(int(size) for size in tensor.shape), str(tensor.dtype)
    short = dtype == "int64" and len(shape) == 1 and shape[0] <= _FEW
    return Argument(shape, dtype, tuple(fetch(tensor).tolist()) if short else ())
