"""Runs an artifact with Engram on the simulated GPU, in a process of its own, and says what the side stream did.

``python -m tests.targets.cuda.side_stream_run ARTIFACT MODE`` prints one JSON document. Modes: ``watch`` lists what
kernels are given while a lookup is under way; ``unjoined`` leaves out the joins; ``load`` only loads.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

from v4c.errors import Error
from v4c.runtime import Model, load
from v4c.runtime.cuda_side_stream import FORK, JOIN, LEAVE, SideStream
from v4c.runtime.dtypes import DTYPES
from v4c.targets.cuda.simulator.build import load_driver

Range = tuple[int, int]


class Watch:
    """Every call inside the compiled functions: which lookups are on the side stream, and whose memory kernels use."""

    def __init__(self, model: Model) -> None:
        self.kernels = model.manifest.build["kernels"]
        self.lookups = self.between = self.readers = 0
        self.wrong: list[str] = []
        self._open: dict[int, list[Range]] = {}
        self._joined: list[Range] = []
        self._side: list[Range] | None = None

    def __call__(self, function: Any, name: str, before: bool, result: Any, *arguments: Any) -> None:
        if not before:
            return
        if name == FORK:
            self._side = []
        elif name == LEAVE:
            assert self._side is not None
            self._open[int(arguments[0])], self._side = self._side, None
        elif name == JOIN:
            self._joined += self._open.pop(int(arguments[0]))
        elif name in self.kernels:
            self._kernel(name, arguments)

    def _kernel(self, name: str, arguments: tuple[Any, ...]) -> None:
        op = self.kernels[name][0]
        used = [_range(a) for a in arguments]
        if (op == "EngramLookup") != (self._side is not None):
            self.wrong.append(f"{name}: on the wrong stream")
        if self._side is not None:
            self.lookups += 1
            self._side += used[1:]
            return
        self.between += bool(self._open)
        self.readers += _overlap(used, self._joined)
        if any(_overlap(used, side) for side in self._open.values()):
            self.wrong.append(f"{name}: memory of a lookup under way")

    def report(self) -> dict[str, Any]:
        counts = {key: getattr(self, key) for key in ("lookups", "between", "readers", "wrong")}
        return {**counts, "unjoined": len(self._open)}


def _range(tensor: Any) -> Range:
    start = int(tensor.data_ptr())
    return start, start + math.prod(tensor.shape) * DTYPES[str(tensor.dtype)].storage.itemsize


def _overlap(these: list[Range], those: list[Range]) -> bool:
    return any(a < d and c < b for a, b in these for c, d in those)


PROMPT = np.arange(3, 25)[None] * 7 % 300


def watch(model: Model) -> dict[str, Any]:
    found = {}
    for batch in (1, 2):  # a step of a single row is a function of its own
        seen = Watch(model)
        with model.new_session(batch, 64) as session:
            session.observe(seen)
            session.prefill(np.repeat(PROMPT, batch, 0), lengths=[22, 3][:batch], chunk=16)
            for token in (5, 6):
                session.decode([token] * batch)
        found[str(batch)] = seen.report()
    return found


def unjoined(model: Model) -> dict[str, Any]:
    with model.new_session(1, 64) as session:
        right = session.prefill(PROMPT), session.decode([5]), session.decode([6])
    SideStream.join = lambda self, number, *tensors: None  # type: ignore[method-assign]
    model = load(sys.argv[1], verify="code")
    message = ""
    with model.new_session(1, 64) as session:
        first = session.prefill(PROMPT)
        try:
            for token in (5, 6):
                session.decode([token])
        except Error as error:
            message = str(error)
    return {
        "finite": bool(np.isfinite(right).all()), "same": bool(np.allclose(first, right[0], atol=1e-3)),
        "recording": message,
    }  # fmt: skip


def main(artifact: Path, mode: str) -> None:
    load_driver()
    try:
        model = load(artifact, verify="code")
        found = {"watch": watch, "unjoined": unjoined, "load": lambda model: {}}[mode](model)
    except Error as error:
        found = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
