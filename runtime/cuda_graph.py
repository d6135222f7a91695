"""A decode step as one CUDA graph: its launches are recorded once and replayed with a single call.

A graph holds pointers. Those of weights, caches and inputs are fixed for a session, which binds and keeps them; the
scratch memory of the step comes from TVM's pool, and stays mapped until that is emptied (`Program.release_scratch`).
A step that runs after that is recorded anew, and also one that runs after another machine was made, which may have
taken memory out of the pool for its constants. Sessions that share a GPU take turns (`GPU.exclusive`), so that what one
leaves in the pool between two steps is free for the others.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from v4c.errors import Error
from v4c.runtime import cuda_library

_NON_BLOCKING = 1  # cudaStreamNonBlocking: no order with the default stream, which cannot be recorded
_RELAXED = 2  # cudaStreamCaptureModeRelaxed: memory may be taken meanwhile, should the pool lack a block
TO_DEVICE, TO_HOST, WITHIN_DEVICE = 1, 2, 3  # cudaMemcpyKind
_NO_TIMING = 2  # cudaEventDisableTiming: the event only orders streams


class Stream:
    """A stream of the first GPU; Error if there is none to be had."""

    def __init__(self) -> None:
        self._runtime = cuda_library.open_runtime()
        self.handle = ctypes.c_void_p()
        self._call("cudaStreamCreateWithFlags", ctypes.byref(self.handle), _NON_BLOCKING)

    def copy(self, to: int, source: int, nbytes: int, kind: int) -> None:
        """Copy between two places once what this stream was given before is done; the host's are pageable memory.

        From the host, the bytes are taken before this returns; to the host, they are there when it returns.
        TVM's own copies go to the default stream, which does not wait for this one.
        """
        self._call("cudaMemcpyAsync", ctypes.c_void_p(to), ctypes.c_void_p(source), ctypes.c_size_t(nbytes), kind,
                   self.handle)  # fmt: skip

    def finish(self) -> None:
        """Wait until everything this stream was given is done."""
        self._call("cudaStreamSynchronize", self.handle)

    def new_event(self) -> ctypes.c_void_p:
        """An event for `mark` and `wait`."""
        event = ctypes.c_void_p()
        self._call("cudaEventCreateWithFlags", ctypes.byref(event), _NO_TIMING)
        return event

    def mark(self, event: ctypes.c_void_p) -> None:
        """Let ``event`` stand for everything this stream has been given so far."""
        self._call("cudaEventRecord", event, self.handle)

    def wait(self, event: ctypes.c_void_p) -> None:
        """Hold back what this stream is given from now on until what ``event`` stands for is done.

        While the stream that marked it is recorded, this one is recorded into the same graph from here on.
        """
        self._call("cudaStreamWaitEvent", self.handle, event, 0)

    def record(self, work: Callable[[], Any]) -> tuple[Any, ctypes.c_void_p]:
        """What ``work`` returns, and its launches on this stream as a graph, which are not made."""
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cudaStreamBeginCapture", self.handle, _RELAXED)
        try:
            result = work()
        finally:
            error = self._runtime.cudaStreamEndCapture(self.handle, ctypes.byref(graph))
        _check("cudaStreamEndCapture", error)
        try:
            self._call("cudaGraphInstantiate", ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
        finally:
            self._call("cudaGraphDestroy", graph)
        return result, executable

    def replay(self, executable: ctypes.c_void_p) -> None:
        """Make the launches of a graph."""
        self._call("cudaGraphLaunch", executable, self.handle)

    def forget(self, executable: ctypes.c_void_p) -> None:
        """Free a graph."""
        self._runtime.cudaGraphExecDestroy(executable)

    def _call(self, name: str, *arguments: Any) -> None:
        _check(name, self._runtime[name](*arguments))


def finish_default_stream() -> None:
    """Wait for the default stream, on which TVM copies; no other stream of this module waits for it."""
    _check("cudaStreamSynchronize", cuda_library.open_runtime().cudaStreamSynchronize(None))


def _check(name: str, error: int) -> None:
    if error:
        raise Error(f"{name}: expected success, found CUDA error {error}")


class RecordedStep:
    """A compiled function that is always called with the same tensors.

    It runs once as it is, which loads kernels and fills the pool; the second call records it, and from then on it is
    replayed until scratch memory is released.

    Args:
        function: bound to weights and caches; its results are kept from one call to the next.
        stream: the current one.
        releases: how often scratch memory has been released so far.
    """

    def __init__(self, function: Callable[..., Any], stream: Stream, releases: Callable[[], int]) -> None:
        self._function, self._stream, self._releases = function, stream, releases
        self._warm = -1
        self._graph: ctypes.c_void_p | None = None
        self._outputs: Any = None

    def __call__(self, *arguments: Any) -> Any:
        if self._warm != self._releases():
            self._forget()
            self._warm = self._releases()
            return self._function(*arguments)
        if self._graph is None:
            self._outputs, self._graph = self._stream.record(lambda: self._function(*arguments))
        self._stream.replay(self._graph)
        return self._outputs

    def _forget(self) -> None:
        if self._graph is not None:
            self._stream.forget(self._graph)
        self._graph = self._outputs = None

    def __del__(self) -> None:
        self._forget()
