"""Processes of peers, as many alive at once as memory has room for."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.peer_list import ROOT, Peer, environment
from v4c.errors import Error
from v4c.frontend.config import ModelConfig

_PAUSE = 0.05
"""Seconds between two peers' turns: threads of the one before stop spinning for work by then."""
_PATIENCE = 20.0
_MOMENT = 5.0
"""Seconds a process has to end: by itself, and when it is told to."""


class Process:
    """One child; see `peer_child`."""

    def __init__(self, name: str, log: Path, threads: int) -> None:
        self.name, self.log = name, log
        with log.open("ab") as errors:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.peer_child"], cwd=ROOT, env=environment(threads), text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            )  # fmt: skip

    def ask(self, do: str, /, **arguments: Any) -> Any:
        """The answer to one request.

        Raises:
            Error: the child reports one, or it ended.
        """
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        try:
            print(json.dumps({"do": do, **arguments}), file=self._child.stdin, flush=True)
            line = self._child.stdout.readline()
        except (BrokenPipeError, ValueError):  # it has gone; its pipes are closed
            line = ""
        if not line:
            code = self._child.wait()
            raise Error(f"{self.name}: its process ended with {code} during {do!r}; see {self.log}")
        answer = json.loads(line)
        if "error" in answer:
            raise Error(f"{self.name}: {answer['error']}")
        return answer["answer"]

    def end(self) -> None:
        """Let it free its memory and end."""
        if self._child.poll() is None and self._child.stdin is not None:
            self._child.stdin.close()
        try:
            self._child.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self.kill()
        self._close()

    def kill(self) -> None:
        """End it now; it has a moment to remove what it has half written."""
        self._child.terminate()
        try:
            self._child.wait(_MOMENT)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._close()

    def _close(self) -> None:
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                pipe.close()


class Pool:
    """Peers' processes. One that is asked is started where it is not there; others end to make room for it.

    Attributes:
        in_turns: whether all `peers` fit at once, so that they can take turns step by step.
        huge_pages: whether v4c's weights are copied into them.
    """

    def __init__(
        self, peers: Iterable[Peer], config: ModelConfig, folder: Path, *, memory: float, threads: int, slack: int,
        huge_pages: bool = False,
    ) -> None:  # fmt: skip
        self.huge_pages = huge_pages
        self._config, self._folder, self._memory = config, folder, memory
        self._threads, self._slack = threads, slack
        self._alive: dict[str, tuple[Peer, Process]] = {}
        self._last: str | None = None
        self.versions: dict[str, str] = {}
        self.in_turns = sum(peer.needs(config) for peer in peers) <= memory

    def ask(self, peer: Peer, do: str, /, **arguments: Any) -> Any:
        """One request to `peer`. Raises `Error` as `Process.ask`; the process is gone then."""
        try:
            process = self._process(peer)
            if self._last != peer.name:
                time.sleep(_PAUSE)
                self._last = peer.name
            return process.ask(do, **arguments)
        except Error:
            self._drop(peer.name)
            raise

    def start(self, peer: Peer) -> None:
        """Have the process of `peer` ready. Raises `Error`: it cannot be loaded."""
        try:
            self._process(peer)
        except Error:
            self._drop(peer.name)
            raise

    def is_alive(self, peer: Peer) -> bool:
        """Whether `peer` would answer without being loaded."""
        return peer.name in self._alive

    def _process(self, peer: Peer) -> Process:
        if peer.name in self._alive:
            return self._alive[peer.name][1]
        wanted = peer.needs(self._config)
        while self._alive and wanted + sum(p.needs(self._config) for p, _ in self._alive.values()) > self._memory:
            self._drop(next(iter(self._alive)))
        process = Process(peer.name, self._folder / f"{peer.name}.log", self._threads)
        self._alive[peer.name] = (peer, process)
        opened = process.ask(
            "open", peer=peer.name, folder=str(self._folder), threads=self._threads, slack=self._slack,
            huge_pages=self.huge_pages,
        )  # fmt: skip
        self.versions[peer.name] = opened["version"]
        return process

    def _drop(self, name: str) -> None:
        if name in self._alive:
            self._alive.pop(name)[1].end()

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for _, process in self._alive.values():
            if error is None:
                process.end()
            else:
                process.kill()
        self._alive.clear()
