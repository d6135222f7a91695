"""A peer in a process of its own: one JSON request a line on stdin, one JSON answer a line on stdout.

Libraries print what they like: their stdout goes to stderr, which the parent keeps in a file.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peer_engine import CHUNK, Engine, State
from benchmarks.peer_list import PEERS, one_line, open_engine, prepare, prepare_checkpoint
from v4c.frontend.presets import preset

LONGEST_FILL = 16384
"""Tokens that are read to fill caches; beyond them, a peer that can pretends (as ``v4c bench`` does)."""
COMPARED_STEPS = 8
"""Steps behind a context whose logits are compared with v4c's."""


class Runner:
    """Measures one engine. Token ids are random and the same in every peer."""

    def __init__(self, engine: Engine, slack: int) -> None:
        self._engine, self._slack = engine, slack
        self._prompt: State | None = None
        self._contexts: dict[int, _Context] = {}

    def warm(self) -> None:
        """Read `CHUNK` tokens, untimed: weights come in from disk, memory is touched, kernels are chosen."""
        if self._prompt is None:
            self._prompt = self._engine.begin(CHUNK)
            self._prompt.read(self._tokens(CHUNK))

    def prefill(self) -> float:
        """Milliseconds to read `CHUNK` tokens from the start, the same as `warm`."""
        self.warm()
        assert self._prompt is not None
        self._prompt.restart()
        return _timed(self._prompt, self._tokens(CHUNK))[0]

    def fill(self, context: int) -> None:
        """Read `context` tokens but for the last `CHUNK`, untimed, unless that was done."""
        if context not in self._contexts:
            self._contexts[context] = _Context(self._engine.begin(context + self._slack), self._tokens(context))
            self._contexts[context].fill()

    def decode(self, context: int, steps: int, save: str | None) -> dict[str, Any]:
        """Milliseconds of `steps` steps behind `context` tokens, and of reading the last `CHUNK` of those.

        Args:
            context: tokens before the first step.
            steps: how many are timed, behind one that is not.
            save: file for the logits of the context's last token and of the first `COMPARED_STEPS` steps.
        """
        kept: list[np.ndarray] = []
        self.fill(context)
        here = self._contexts[context]
        last_chunk, logits = here.arrive()
        tokens = self._tokens(context + self._slack)
        if logits is not None:
            kept.append(logits)
        times = []
        for index in range(steps + 1):
            ms, logits = _timed(here.state, tokens[here.position : here.position + 1])
            here.position += 1
            if index:
                times.append(ms)
            if save and len(kept) <= COMPARED_STEPS:
                kept.append(logits.copy())
        if save:
            np.save(save, np.stack(kept))
        return {"ms": times, "last_chunk_ms": last_chunk}

    def close(self) -> None:
        """Free the caches."""
        for state in [self._prompt, *(c.state for c in self._contexts.values())]:
            if state is not None:
                state.close()

    def _tokens(self, count: int) -> np.ndarray:
        """The first `count` ids of a sequence that does not depend on `count`."""
        return np.random.default_rng(0).integers(0, self._engine.vocab_size, count)


class _Context:
    """A state that stands behind some tokens, and can be brought there again."""

    def __init__(self, state: State, tokens: np.ndarray) -> None:
        self.state, self._tokens = state, tokens
        self.position = 0
        self._marked = self._arrived = False

    def fill(self) -> None:
        """Read all tokens but for the last `CHUNK`, or up to where a peer pretends; so far `rewind` goes back."""
        context = len(self._tokens)
        end = context - CHUNK if context <= LONGEST_FILL else LONGEST_FILL
        while self.position < end:
            self.state.read(self._tokens[self.position : self.position + CHUNK])
            self.position += CHUNK
        if 0 < self.position == context - CHUNK < LONGEST_FILL:
            self._marked = self.state.mark()

    def arrive(self) -> tuple[float | None, np.ndarray | None]:
        """Stand behind all tokens: the first time by reading the last `CHUNK` behind `fill`, then by doing so again.

        Returns:
            Milliseconds of the last `CHUNK` tokens, and the logits behind the last; None where they were not read now.
            A peer that cannot go back goes on from where it stands.
        """
        context = len(self._tokens)
        if context > LONGEST_FILL:
            self._pretend(context)
            return None, None
        if self._arrived and not self._marked:
            return None, None
        if self._arrived:
            self.state.rewind()
            self.position = context - CHUNK
        self._arrived = True
        ms, logits = _timed(self.state, self._tokens[self.position : context])
        whole = context > CHUNK and context % CHUNK == 0
        self.position = context
        return (ms if whole else None), logits.copy()

    def _pretend(self, context: int) -> None:
        if not self.state.pretend(context):
            raise NotImplementedError(f"expected a context up to {LONGEST_FILL} tokens, found {context}")
        self.position = context


def _timed(state: State, tokens: np.ndarray) -> tuple[float, np.ndarray]:
    start = time.perf_counter()
    logits = state.read(tokens)
    return (time.perf_counter() - start) * 1e3, logits


class Child:
    """Answers requests: ``do`` says what, the rest are its arguments."""

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._runner: Runner | None = None

    def answer(self, request: dict[str, Any]) -> Any:
        """What the method called ``do_<what>`` returns."""
        what = request.pop("do")
        method: Callable[..., Any] = getattr(self, f"do_{what}")
        return method(**request)

    def do_checkpoint(self, model: str, folder: str) -> None:
        """Write the checkpoint."""
        prepare_checkpoint(preset(model), Path(folder))

    def do_prepare(self, peer: str, folder: str) -> None:
        """Make what a peer loads."""
        prepare(PEERS[peer], Path(folder))

    def do_open(self, peer: str, folder: str, threads: int, slack: int, huge_pages: bool = False) -> dict[str, Any]:
        """Load a peer, and let it read one prompt that is not timed."""
        self._engine = open_engine(PEERS[peer], Path(folder), threads, huge_pages)
        self._runner = Runner(self._engine, slack)
        self._runner.warm()
        return {"version": self._engine.version}

    def do_prefill(self) -> float:
        """`Runner.prefill`."""
        assert self._runner is not None
        return self._runner.prefill()

    def do_fill(self, context: int) -> None:
        """`Runner.fill`."""
        assert self._runner is not None
        self._runner.fill(context)

    def do_decode(self, context: int, steps: int, save: str | None = None) -> dict[str, Any]:
        """`Runner.decode`."""
        assert self._runner is not None
        return self._runner.decode(context, steps, save)

    def do_limits(self) -> Any:
        """The machine's; v4c's engine only."""
        return self._engine.limits()  # type: ignore[union-attr]

    def do_costs(self, context: int, tokens: int) -> Any:
        """As v4c counts kernel calls; v4c's engine only."""
        return self._engine.costs(context, tokens)  # type: ignore[union-attr]

    def close(self) -> None:
        """Free what a peer holds, before the process ends."""
        if self._runner is not None:
            self._runner.close()


def main() -> None:
    """Answer until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that unfinished output is removed
    child = Child()
    for line in sys.stdin:
        try:
            answer = {"answer": child.answer(json.loads(line))}
        except Exception as error:
            answer = {"error": one_line(error)}
        print(json.dumps(answer), file=answers, flush=True)
    child.close()


if __name__ == "__main__":
    main()
