"""Streams of the simulated GPU: what real ones may do to programs that do not wait shows. Copies stand for
kernels."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CAPTURE_UNSUPPORTED, UNJOINED, ISOLATION, CAPTURED_EVENT = 900, 904, 905, 907
SIZE = 64


class Runtime:
    """The simulated CUDA runtime, loaded into this process; every call that fails is an AssertionError."""

    def __init__(self, folder: Path) -> None:
        from v4c.targets.cuda.simulator.build import build_driver

        driver, runtime = build_driver(folder)
        ctypes.CDLL(str(driver), ctypes.RTLD_GLOBAL)
        self.library = ctypes.CDLL(str(runtime))
        self.main, self.side = (self.new("cudaStreamCreateWithFlags", 1) for _ in range(2))

    def new(self, name: str, *arguments: Any) -> ctypes.c_void_p:
        """A handle that a function makes."""
        handle = ctypes.c_void_p()
        self(name, ctypes.byref(handle), *arguments)
        return handle

    def __call__(self, name: str, *arguments: Any) -> None:
        assert self.error(name, *arguments) == 0, name

    def error(self, name: str, *arguments: Any) -> int:
        return int(self.library[name](*arguments))

    def memory(self, content: bytes | None = None) -> ctypes.c_void_p:
        """Device memory, NaN or with a content."""
        memory = self.new("cudaMalloc", ctypes.c_size_t(SIZE))
        if content is not None:
            self("cudaMemcpyAsync", memory, content, ctypes.c_size_t(SIZE), 1, self.main)
        return memory

    def copy(self, to: ctypes.c_void_p, source: ctypes.c_void_p, stream: ctypes.c_void_p) -> None:
        self("cudaMemcpyAsync", to, source, ctypes.c_size_t(SIZE), 3, stream)

    def read(self, memory: ctypes.c_void_p) -> bytes:
        content = ctypes.create_string_buffer(SIZE)
        self("cudaMemcpyAsync", content, memory, ctypes.c_size_t(SIZE), 2, self.main)
        return content.raw

    def after(self, waits: ctypes.c_void_p, given: ctypes.c_void_p) -> None:
        """Have one stream wait for what another was given."""
        event = self.new("cudaEventCreateWithFlags", 2)
        self("cudaEventRecord", event, given)
        self("cudaStreamWaitEvent", waits, event, 0)


CONTENT, NAN = bytes(range(SIZE)), b"\xff" * SIZE


def fork_and_join(on: Runtime, fork: bool, join: bool) -> bytes:
    """Main writes a, the side stream copies it to b, main copies b to c."""
    source, a, b, c = on.memory(CONTENT), on.memory(), on.memory(), on.memory()
    on.copy(a, source, on.main)
    if fork:
        on.after(on.side, on.main)
    on.copy(b, a, on.side)
    if join:
        on.after(on.main, on.side)
    on.copy(c, b, on.main)
    found = on.read(c)
    on("cudaStreamSynchronize", on.side)
    return found


def main(folder: Path) -> None:
    on = Runtime(folder)
    backwards = "V4C_SIM_BACKWARDS" in os.environ
    assert fork_and_join(on, fork=True, join=True) == CONTENT
    # The side stream runs as late as it may, or as early.
    assert fork_and_join(on, fork=True, join=False) == (CONTENT if backwards else NAN)
    assert fork_and_join(on, fork=False, join=True) == (NAN if backwards else CONTENT)

    graph = ctypes.c_void_p()
    source, a, b, c = on.memory(CONTENT), on.memory(), on.memory(), on.memory()
    on("cudaStreamBeginCapture", on.main, 2)
    on.copy(a, source, on.main)
    on.after(on.side, on.main)
    on.copy(b, a, on.side)
    assert on.error("cudaStreamSynchronize", on.main) == CAPTURE_UNSUPPORTED
    forgotten = on.new("cudaEventCreateWithFlags", 2)
    on("cudaEventRecord", forgotten, on.side)
    on.after(on.main, on.side)
    on.copy(c, b, on.main)
    on("cudaStreamEndCapture", on.main, ctypes.byref(graph))
    executable = on.new("cudaGraphInstantiate", graph, ctypes.c_ulonglong(0))
    assert on.read(c) == NAN  # recorded, not run
    assert on.error("cudaStreamWaitEvent", on.main, forgotten, 0) == CAPTURED_EVENT
    for content in (CONTENT, CONTENT[::-1]):
        on("cudaMemcpyAsync", source, content, ctypes.c_size_t(SIZE), 1, on.main)
        on("cudaGraphLaunch", executable, on.main)
        assert on.read(c) == content
    on.copy(b, source, on.side)  # the side stream has left the recording

    on("cudaStreamBeginCapture", on.main, 2)
    on.after(on.side, on.main)
    on.copy(b, a, on.side)
    assert on.error("cudaStreamEndCapture", on.main, ctypes.byref(graph)) == UNJOINED
    outside = on.new("cudaEventCreateWithFlags", 2)
    on("cudaEventRecord", outside, on.side)
    on("cudaStreamBeginCapture", on.main, 2)
    assert on.error("cudaStreamWaitEvent", on.main, outside, 0) == ISOLATION
    on("cudaStreamEndCapture", on.main, ctypes.byref(graph))

    held = on.new("cudaMallocHost", ctypes.c_size_t(SIZE))
    assert ctypes.string_at(held, SIZE) == NAN
    on("cudaFreeHost", held)
    os.environ["V4C_SIM_HOST_BYTES"] = str(SIZE - 1)
    assert on.error("cudaMallocHost", ctypes.byref(held), ctypes.c_size_t(SIZE)) == 2


@pytest.mark.parametrize("backwards", [False, True])
def test_streams(backwards: bool, tmp_path: Path) -> None:
    """In a process of its own, which has the device for good."""
    environment = {k: v for k, v in os.environ.items() if k != "V4C_SIM_BACKWARDS"}
    if backwards:
        environment["V4C_SIM_BACKWARDS"] = "1"
    done = subprocess.run(
        [sys.executable, __file__, tmp_path], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    main(Path(sys.argv[1]))
