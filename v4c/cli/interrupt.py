"""Ctrl-C that is not lost.

Python drops a KeyboardInterrupt that happens to be raised inside a destructor or a weak reference's callback, which is
not rare while torch is being imported. Here it is remembered, and raised again at the next step of the work.
"""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any


class Interrupts:
    """Remembers SIGINT between `__enter__` and `__exit__`; does nothing outside the main thread."""

    def __init__(self) -> None:
        self._seen = False
        self._former: Any = None

    def check(self) -> None:
        """Raise the KeyboardInterrupt that got lost, if one did."""
        if self._seen:
            raise KeyboardInterrupt

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._former = signal.signal(signal.SIGINT, self._handle)
            sys.unraisablehook = _quiet
        return self

    def __exit__(self, *_: object) -> None:
        if self._former is not None:
            signal.signal(signal.SIGINT, self._former)
            sys.unraisablehook = sys.__unraisablehook__

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._seen = True
        raise KeyboardInterrupt


def _quiet(unraisable: Any) -> None:
    """Python's report of an exception it dropped, except for the one that `check` raises again."""
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
