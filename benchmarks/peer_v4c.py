"""v4c as one of the peers, and what only it can tell: the machine's limits and what its kernels move and compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import v4c
from benchmarks.peer_engine import CHUNK, Engine, State
from v4c.benchmark import decoding, measure, prefilling
from v4c.benchmark_limits import limits_of
from v4c.passes.cost import Cost
from v4c.runtime.session import Session


class V4cEngine(Engine):
    """A compiled artifact."""

    def __init__(self, path: Path, threads: int, storage: str, huge_pages: bool = False) -> None:
        self.path = path
        self.model = v4c.load(path, threads=threads, verify="code", huge_pages=huge_pages)
        self.vocab_size = self.model.vocab_size
        self.version = f"v4c {self.model.manifest.v4c_version}"

    def begin(self, capacity: int) -> State:
        return _V4cState(self.model.new_session(max_context=capacity))

    def limits(self) -> dict[str, float]:
        """The best of some counts, taken now: bytes per second from memory, FLOP per second of float32 products."""
        limits = limits_of(self.model, self.path)  # not kept: what it reads is half a gigabyte, in every v4c peer
        limits.measure()
        return {"bandwidth": limits.bandwidth, "peak": limits.peak}

    def costs(self, context: int, tokens: int) -> dict[str, Any]:
        """Bytes and FLOPs of a decode step and of a prompt, summed over kernel calls as ``v4c bench`` counts them."""
        kernels = self.model.manifest.build["kernels"]
        result: dict[str, Any] = {}
        for name, work in (
            ("decode", decoding(self.model, context, 1)),
            ("prefill", prefilling(self.model, tokens, 1)),
        ):
            cost = sum((launch.cost for launch in measure(work, kernels, False).launches), Cost())
            result[name] = {"bytes": cost.bytes, "flops": cost.flops}
        return result


class _V4cState(State):
    def __init__(self, session: Session) -> None:
        self._session = session
        self._marked: Session | None = None

    def read(self, tokens: np.ndarray) -> np.ndarray:
        if len(tokens) == 1:
            return self._session.decode(tokens)[0]
        return self._session.prefill(tokens[None], chunk=CHUNK)[0]

    def restart(self) -> None:
        self._session.reset()

    def mark(self) -> bool:
        self._marked = self._session.fork()
        return True

    def rewind(self) -> None:
        assert self._marked is not None
        self._session.close()
        self._session = self._marked.fork()

    def pretend(self, position: int) -> bool:
        self._session.pretend(position)
        return True

    def close(self) -> None:
        self._session.close()
        if self._marked is not None:
            self._marked.close()
