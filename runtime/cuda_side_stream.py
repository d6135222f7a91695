"""A second stream, on which rows of host tables are fetched while the first runs the layers before their reader.

Compiled code says when (`v4c.targets.cuda.side_stream`), by calling functions of this module by name:

- `FORK`: launches go to the side stream from now on; they begin when what the main stream was given so far is done.
- `LEAVE` number: launches go to the main stream again; the number stands for what the side stream has been given.
- `JOIN` number, tensors: what the main stream is given from now on waits for what the number stands for. The tensors
  are what the side stream uses meanwhile: as arguments they are alive up to here, so that nobody else has their memory.

While a step is recorded (`cuda_graph`), waiting for an event of a recorded stream takes the side stream into the
recording, as a branch of the graph that ends where it is joined (CUDA C++ Programming Guide, "Cross-stream dependencies
and events").
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator
from typing import Any

from v4c.runtime.cuda_graph import Stream
from v4c.runtime.library import import_ffi

FORK, LEAVE, JOIN = "v4c.cuda.fork", "v4c.cuda.leave", "v4c.cuda.join"


class SideStream:
    """The side stream of ``main``, on which kernels are launched by default; used by one thread at a time."""

    def __init__(self, main: Stream, device: Any) -> None:
        self._main, self._side, self._device = main, Stream(), device
        self._use_stream = import_ffi().use_raw_stream
        self._forked = main.new_event()
        self._left: dict[int, ctypes.c_void_p] = {}
        self._elsewhere = contextlib.ExitStack()  # while launches go to the side stream
        _register()

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Within it, compiled code that this thread calls forks to this stream."""
        outer = getattr(_current, "side", None)
        _current.side = self
        try:
            yield
        finally:
            self._elsewhere.close()  # compiled code may have failed in between
            _current.side = outer

    def fork(self) -> None:
        self._main.mark(self._forked)
        self._side.wait(self._forked)
        self._elsewhere.enter_context(self._use_stream(self._device, self._side.handle.value))

    def leave(self, number: int) -> None:
        if number not in self._left:
            self._left[number] = self._side.new_event()
        self._side.mark(self._left[number])
        self._elsewhere.close()

    def join(self, number: int, *tensors: Any) -> None:
        self._main.wait(self._left[number])


_current = threading.local()


def _register() -> None:
    """Make the functions known to compiled code, which looks them up by name when it is loaded."""
    register = import_ffi().register_global_func
    register(FORK, lambda: _current.side.fork(), override=True)
    register(LEAVE, lambda number: _current.side.leave(number), override=True)
    register(JOIN, lambda number, *tensors: _current.side.join(number, *tensors), override=True)
