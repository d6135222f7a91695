"""Ctrl-C and SIGTERM that are not lost and leave nothing behind.

Python drops a KeyboardInterrupt that happens to be raised inside a destructor or a weak reference's callback, which is
not rare while torch is being imported. Here it is remembered, and raised again at the next step of the work.
"""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised where Ctrl-C would be, so that unfinished output is removed all the same."""


_KINDS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}


class Interrupts:
    """Remembers SIGINT and SIGTERM between `__enter__` and `__exit__`; does nothing outside the main thread."""

    def __init__(self) -> None:
        self._seen: type[KeyboardInterrupt] | None = None
        self._former: dict[signal.Signals, Any] = {}

    def check(self) -> None:
        """Raise the interrupt that got lost, if one did."""
        if self._seen is not None:
            raise self._seen

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._handle) for number in _KINDS}
            sys.unraisablehook = _quiet
        return self

    def __exit__(self, *_: object) -> None:
        for number, former in self._former.items():
            signal.signal(number, former)
        if self._former:
            sys.unraisablehook = sys.__unraisablehook__

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._seen = _KINDS[signal.Signals(number)]
        raise self._seen


def _quiet(unraisable: Any) -> None:
    """Python's report of an exception it dropped, except for the one that `check` raises again."""
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
