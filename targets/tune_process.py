"""Keeps the tuner's child process: one that lives long, and is replaced after a crash or at the time limit."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any


class TrialFailed(Exception):
    """A request that brought no times; says why."""


class Worker:
    """The child process, started when first needed.

    Args:
        threads: threads of its kernels.
        time_limit: seconds for one request, from its sending to the answer.
        command: what to run: requests come as lines of JSON on its stdin, and answers go as such to its stdout; one
            with the key ``failed`` says why there are no times.
    """

    def __init__(self, threads: int, time_limit: float, command: Sequence[str]) -> None:
        self._command, self._time_limit = list(command), time_limit
        # Left alone, TVM would pin its threads to the first cores, whoever else runs there.
        self._environment = {**os.environ, "TVM_NUM_THREADS": str(threads), "TVM_BIND_THREADS": "0"}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            TrialFailed: the child could not do it, took too long, or died.
        """
        process = self._running()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            line = self._line(process)
        except BrokenPipeError:
            line = b""
        except TimeoutError:
            self.stop()
            raise TrialFailed(f"no result within {self._time_limit:g} s") from None
        except BaseException:  # an interrupt; an answer on its way would be taken for the next one's
            self.stop()
            raise
        if not line:
            raise TrialFailed(self._died())
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise TrialFailed(answer["failed"])
        return answer

    def stop(self) -> None:
        """End the child, if there is one."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            # A session of its own: Ctrl-C is for the parent, which ends the child.
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0,
                env=self._environment, start_new_session=True,
            )  # fmt: skip
        return self._process

    def _line(self, process: subprocess.Popen[bytes]) -> bytes:
        """The next line of the child; empty where it has ended; TimeoutError when the time is over."""
        assert process.stdout is not None
        deadline, found = time.monotonic() + self._time_limit, b""
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while not found.endswith(b"\n"):
                if not selector.select(deadline - time.monotonic()):
                    raise TimeoutError
                piece = os.read(process.stdout.fileno(), 1 << 16)
                if not piece:
                    return b""
                found += piece
        return found

    def _died(self) -> str:
        process = self._process
        assert process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1.0)
        code = process.returncode
        self.stop()
        if code is not None and code < 0:
            return f"the child process was ended by {signal.Signals(-code).name}"
        return f"the child process ended with exit code {code}"
